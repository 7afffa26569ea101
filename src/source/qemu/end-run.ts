import type { SourceNote } from '../source.js';
import { readMachine } from './machine-state.js';
import type { QemuContext } from './qemu-context.js';
import { isQemuGone } from '../../lib/qmp.js';
import type { RunPlaces } from './run-places.js';
import { removeBitmaps, removeTagged } from './tear-down.js';

/**
 * Takes out of QEMU what the run added, with the record of changes it began when that one is named, and
 * removes its scratch space. Whatever is gone already is fine, also QEMU itself. The scratch space stays
 * while QEMU may still use it: another attempt finds the NBD server by it.
 */
export async function endRun(
  context: QemuContext,
  options: {
    places: RunPlaces;
    record: string | null;
    note?: (note: SourceNote) => void;
    signal?: AbortSignal;
  },
): Promise<void> {
  const { places } = options;
  if (!(await takeOut(context, options))) return;
  await context.host.removeRunDirectory(
    { base: places.scratchBase, runId: places.runId },
    { signal: options.signal ?? AbortSignal.timeout(context.settings.snapshot.commandTimeoutMs) },
  );
}

/** Answers whether nothing uses the run's directory any more. */
async function takeOut(
  context: QemuContext,
  { places, record, note, signal }: Parameters<typeof endRun>[1],
): Promise<boolean> {
  try {
    await using qmp = await context.connect(signal);
    const { isServerGone } = await removeTagged(qmp, { tag: places.tag, serverSocket: places.serverSocket });
    if (record !== null) await removeBitmaps(qmp, await readMachine(qmp), (name) => name === record);
    return isServerGone;
  } catch (error) {
    if (!isQemuGone(error)) throw error;
    note?.({
      level: 'warning',
      code: 'MACHINE_GONE',
      message: 'QEMU ended during the run; what the run had added ended with it',
    });
    return true;
  }
}
