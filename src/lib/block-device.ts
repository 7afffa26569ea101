import { z } from 'zod';
import { runTool } from './process.js';

const TIMEOUT_MS = 30_000;

/** Exact bytes of a block device, as the kernel says. The path must be absolute. */
export async function blockDeviceBytes(device: string): Promise<number> {
  const { stdout } = await runTool('blockdev', ['--getsize64', device], { timeoutMs: TIMEOUT_MS });
  return z.coerce.number().int().nonnegative().parse(stdout.trim());
}
