import { z } from 'zod';
import { systemClock } from '../../lib/clock.js';
import { AppError } from '../../lib/errors.js';
import { runTool } from '../../lib/process.js';
import type { SourceSettings } from '../source-settings.js';
import { armGuard, sendCommand, type Guard } from '../thaw-guard.js';
import { beginRecords, insertFilters, type FleecedDisk } from './fleecing.js';
import { ask } from './machine-state.js';
import type { QmpClient } from '../../lib/qmp.js';

export interface Instant {
  capturedAtMs: number;
  /** How long the machine stood still for it. */
  pauseMs: number;
}

/** What fixes the instant, prepared so that nothing slow is left to do. Disposal ends the guard. */
export interface InstantTaker extends AsyncDisposable {
  /** Once only. Not interrupted by an abort. */
  take(): Promise<Instant>;
}

export interface InstantOptions {
  socket: string;
  disks: readonly FleecedDisk[];
  /** The record of changes to begin. */
  record: string;
  settings: SourceSettings['snapshot'];
  signal: AbortSignal;
}

/**
 * One filter is inserted at one moment. Several are not, so a machine that runs stands still meanwhile,
 * for a few milliseconds, and a process of its own lets it go on should this one die in them. There is none for
 * a machine that stands still already: nobody but its owner lets that one go on.
 */
export async function prepareInstant(qmp: QmpClient, options: InstantOptions): Promise<InstantTaker> {
  const { disks, record, settings, socket } = options;
  let guard: Guard | null = null;
  if (disks.length > 1 && (await isRunning(qmp))) {
    await writeBack(disks, { timeoutMs: settings.commandTimeoutMs, signal: options.signal });
    guard = await armGuard({
      undo: sendCommand(socket, ['{"execute":"qmp_capabilities"}\n', '{"execute":"cont"}\n']),
      limitMs: settings.freezeLimitMs + settings.commandTimeoutMs,
    });
  }
  const take = async (): Promise<Instant> => {
    await beginRecords(qmp, disks, record);
    if (disks.length > 1 && (await isRunning(qmp))) {
      if (guard === null) throw new AppError('SNAPSHOT_LOST', 'the machine was resumed just now');
      return takeStopped(qmp, disks, guard);
    }
    await insertFilters(qmp, disks);
    return { capturedAtMs: systemClock.nowMs(), pauseMs: 0 };
  };
  return {
    take: () => qmp.uninterrupted(take),
    [Symbol.asyncDispose]: async () => guard?.disarm(),
  };
}

/**
 * QEMU flushes every disk when it stops, while the guest stands still: what the host's cache holds is written
 * before that. An image that cannot be opened from here is left to QEMU.
 */
async function writeBack(
  disks: readonly FleecedDisk[],
  control: { timeoutMs: number; signal: AbortSignal },
): Promise<void> {
  const files = disks.map(({ image }) => image.filename).filter((file) => file.startsWith('/'));
  if (files.length === 0) return;
  await runTool('sync', ['--data', '--', ...files], { ...control, acceptExitCodes: [0, 1] });
}

async function takeStopped(qmp: QmpClient, disks: readonly FleecedDisk[], guard: Guard): Promise<Instant> {
  const startMs = performance.now();
  // Sent together: neither our event loop nor the way there and back makes the pause longer.
  const [stop, inserted, cont] = await Promise.allSettled([
    qmp.execute('stop'),
    insertFilters(qmp, disks),
    qmp.execute('cont'),
  ]);
  const pauseMs = performance.now() - startMs;
  // It gets at the socket when we leave it.
  if (cont.status === 'rejected') guard.fire();
  for (const result of [cont, stop, inserted]) {
    if (result.status === 'rejected') throw result.reason;
  }
  return { capturedAtMs: systemClock.nowMs(), pauseMs };
}

async function isRunning(qmp: QmpClient): Promise<boolean> {
  const { status } = await ask(qmp, { command: 'query-status', schema: z.object({ status: z.string() }) });
  return status === 'running';
}
