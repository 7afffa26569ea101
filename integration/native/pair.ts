import { makeQcow2, makeRaw, type Region } from '../lab/disk-image.js';
import type { LabDirectory } from '../lab/directory.js';
import { startQemuNbd, type LabNbdServer } from '../lab/nbd-server.js';

export interface Pair extends AsyncDisposable {
  source: LabNbdServer;
  sink: LabNbdServer;
  sourcePath: string;
  sinkPath: string;
}

let pairs = 0;

/** A raw source and a fresh QCOW2 sink behind qemu-nbd, sizes in bytes. */
export async function startPair(lab: LabDirectory, sizeBytes: number, regions: Region[]): Promise<Pair> {
  const base = lab.file(`p${pairs++}`);
  const [sourcePath, sinkPath] = [`${base}.raw`, `${base}.qcow2`];
  await makeRaw({ path: sourcePath, sizeBytes, regions });
  await makeQcow2({ path: sinkPath, sizeBytes: Math.ceil(sizeBytes / 512) * 512 });
  const source = await startQemuNbd({
    image: sourcePath,
    format: 'raw',
    socketPath: `${base}s.sock`,
    isReadOnly: true,
  });
  const sink = await startQemuNbd({ image: sinkPath, format: 'qcow2', socketPath: `${base}d.sock` });
  return {
    source,
    sink,
    sourcePath,
    sinkPath,
    [Symbol.asyncDispose]: async () => {
      await source.stop();
      await sink.stop();
    },
  };
}
