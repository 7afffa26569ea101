import path from 'node:path';
import { AppError } from '../../lib/errors.js';
import type { PointId, RunId } from '../../lib/id.js';
import { bitmapNameFor } from '../bitmap-name.js';
import { tagOf } from './fleecing.js';

/** Bytes of a Unix socket's path: sun_path has 108 with the NUL. */
const MAX_SOCKET_PATH = 107;

/** Where a run is found, by nothing but its ids: also by whoever cleans up after it. */
export interface RunPlaces {
  runId: RunId;
  /** Begins the name of everything that the run adds to QEMU. */
  tag: string;
  /** The record of changes that the run begins. */
  record: string;
  scratchBase: string;
  directory: string;
  serverSocket: string;
}

export function placesOf(scratchBase: string, run: { runId: RunId; pointId: PointId }): RunPlaces {
  const directory = path.join(scratchBase, run.runId);
  const serverSocket = path.join(directory, 'nbd.sock');
  if (Buffer.byteLength(serverSocket) > MAX_SOCKET_PATH) {
    throw new AppError('CONFIG_INVALID', `${scratchBase} is too long a path for sockets in it`, {
      details: { setting: 'snapshot.scratchDirectory', limit: MAX_SOCKET_PATH },
    });
  }
  const tag = tagOf(run.runId);
  return { runId: run.runId, tag, record: bitmapNameFor(run.pointId), scratchBase, directory, serverSocket };
}
