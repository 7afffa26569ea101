import path from 'node:path';
import { qemuImg } from '../../../integration/lab/disk-image.js';
import { startQemuNbd } from '../../../integration/lab/nbd-server.js';
import { runTool } from '../../../src/lib/process.js';
import { childrenSubject, measure, type Usage } from './usage.js';
import type { SourceDisk } from './source-disk.js';

const TOOL_TIMEOUT_MS = 1_800_000;

/** nbdcopy into a QCOW2 file behind a qemu-nbd, flushed; from the start of that server to its end. */
export async function nbdcopyFull(source: SourceDisk, output: string, sizeBytes: number): Promise<Usage> {
  await qemuImg(['create', '-q', '-f', 'qcow2', output, String(sizeBytes)]);
  const subject = childrenSubject();
  const { usage } = await measure(subject, async () => {
    const sink = await startQemuNbd({
      image: output,
      format: 'qcow2',
      socketPath: path.join(path.dirname(output), 'sink.sock'),
      shared: 32,
      extra: ['--discard=unmap'],
    });
    try {
      await runTool('nbdcopy', ['--flush', '--destination-is-zero', source.uri, sink.uri], {
        timeoutMs: TOOL_TIMEOUT_MS,
      });
    } finally {
      await sink.stop();
    }
  });
  return usage;
}

export async function convertFull(source: SourceDisk, output: string): Promise<Usage> {
  return convert(['-W', '-m', '8', '-f', 'raw', '-O', 'qcow2', source.uri, output]);
}

export async function convertRestore(top: string, output: string): Promise<Usage> {
  return convert(['-f', 'qcow2', '-O', 'raw', top, output]);
}

async function convert(args: string[]): Promise<Usage> {
  const { usage } = await measure(childrenSubject(), () =>
    runTool('qemu-img', ['convert', ...args], { timeoutMs: TOOL_TIMEOUT_MS }),
  );
  return usage;
}

/** Debian's package with its own defaults. The output directory must be empty for a full. */
export async function virtnbdbackup(options: {
  uri: string;
  domain: string;
  level: 'full' | 'inc';
  output: string;
  scratch: string;
}): Promise<Usage> {
  const { uri, domain, level, output, scratch } = options;
  const socket = path.join(scratch, 'nbd.sock');
  const where = ['--output', output, '--scratchdir', scratch, '--socketfile', socket];
  const args = ['--uri', uri, '--domain', domain, '--level', level, ...where];
  const { usage } = await measure(childrenSubject(), () =>
    runTool('virtnbdbackup', args, { timeoutMs: TOOL_TIMEOUT_MS }),
  );
  return usage;
}
