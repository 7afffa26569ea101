import { once } from 'node:events';
import type { Response } from 'express';
import type { RunView } from '../engine/types.js';
import type { Logger } from '../lib/log.js';
import { describeProblem } from './problem.js';

const HEARTBEAT_MS = 15_000;

function toEvent(name: string, id: number, data: unknown): string {
  return `event: ${name}\nid: ${id}\ndata: ${JSON.stringify(data)}\n\n`;
}

/**
 * Writes the runs as server-sent events until the iteration ends, and ends the answer. `signal`
 * aborts when the client has left or the server closes; the iteration must end on it too. A slow
 * client slows the iteration, nothing is heaped up for it.
 */
export async function sendEvents(
  res: Response,
  runs: AsyncIterable<RunView>,
  context: { signal: AbortSignal; logger: Logger },
): Promise<void> {
  const { signal, logger } = context;
  res.status(200).setHeader('Content-Type', 'text/event-stream; charset=utf-8');
  res.setHeader('X-Accel-Buffering', 'no');
  res.flushHeaders();
  const heartbeat = setInterval(() => {
    if (!res.writableNeedDrain) res.write(': heartbeat\n\n');
  }, HEARTBEAT_MS);
  let id = 0;
  try {
    for await (const run of runs) {
      if (signal.aborted) break;
      id += 1;
      if (!res.write(toEvent('progress', id, run))) await once(res, 'drain', { signal });
    }
  } catch (error) {
    // The client's leaving is the ordinary end of a stream; anything else is told as its last event.
    if (!signal.aborted) res.write(toEvent('problem', id + 1, describeProblem(error, logger)));
  } finally {
    clearInterval(heartbeat);
    res.end();
  }
}
