import { readFile, writeFile } from 'node:fs/promises';
import { runTool } from '../../src/lib/process.js';
import { startLabServer } from './server.js';

/**
 * Mounts (FUSE) on `file` the bytes of another, read-only and slow. Disposal unmounts it: whoever has it open cannot
 * read on then.
 */
export async function startSlowFile(options: {
  content: string;
  file: string;
  bytesPerSecond: number;
}): Promise<AsyncDisposable> {
  const { content, file, bytesPerSecond } = options;
  await writeFile(file, '');
  const isReadOnly = 'read-only=on';
  const server = await startLabServer(
    'qemu-storage-daemon',
    [
      ...['--object', `throttle-group,id=slow,x-bps-read=${bytesPerSecond}`],
      ...['--blockdev', `driver=file,node-name=content,filename=${content},${isReadOnly}`],
      ...['--blockdev', `driver=throttle,node-name=slow,file=content,throttle-group=slow,${isReadOnly}`],
      ...['--export', `type=fuse,id=fuse,node-name=slow,mountpoint=${file}`],
    ],
    { isReady: () => isMounted(file) },
  );
  return {
    [Symbol.asyncDispose]: async () => {
      await server.kill();
      if (await isMounted(file)) await runTool('umount', ['--lazy', file], { timeoutMs: 10_000 });
    },
  };
}

/** Whatever became of its server. */
async function isMounted(file: string): Promise<boolean> {
  return (await readFile('/proc/self/mountinfo', 'utf8')).includes(` ${file} `);
}
