import { z } from 'zod';
import { AppError } from '../src/lib/errors.js';
import type { ApplianceId, RepositoryId } from '../src/lib/id.js';
import type { Backend } from './backend.js';
import type { RepositoryContext } from './context.js';
import { MARKER_FILE } from './layout.js';
import { idSchema, requireSealed, sealJson, timestampSchema } from './sealed-json.js';
import { FORMAT_VERSION, type RepositoryMarker } from './types.js';

const markerSchema = z.strictObject({
  formatVersion: z.literal(FORMAT_VERSION),
  repositoryId: idSchema<RepositoryId>(),
  hash: z.enum(['xxh3-128', 'sha-256']),
  clusterBytes: z.literal(65536),
  ownerApplianceId: idSchema<ApplianceId>(),
  createdAt: timestampSchema,
});

/** Reads the marker. REPOSITORY_OFFLINE when there is none, REPOSITORY_FORMAT when it is newer or no marker. */
export async function readMarker(backend: Backend): Promise<RepositoryMarker> {
  const data = await backend.read(MARKER_FILE, { maxBytes: 65536 });
  if (data === undefined) {
    throw new AppError('REPOSITORY_OFFLINE', `no ${MARKER_FILE} in the repository directory`, {
      details: { root: backend.localPath('') },
    });
  }
  return requireSealed(data, {
    schema: markerSchema,
    what: MARKER_FILE,
    formatVersion: FORMAT_VERSION,
    code: 'REPOSITORY_FORMAT',
  });
}

export function encodeMarker(marker: RepositoryMarker): Buffer {
  return sealJson(marker);
}

/**
 * The check before every write: the marker is there now, it is the one this repository was opened
 * with, and this appliance owns it. Rejects with REPOSITORY_OFFLINE or REPOSITORY_FOREIGN.
 */
export async function requireWritable(context: RepositoryContext): Promise<void> {
  if (context.applianceId === undefined) {
    throw new AppError('REPOSITORY_FOREIGN', 'the repository was opened for reading only');
  }
  const current = await readMarker(context.backend);
  if (current.repositoryId !== context.marker.repositoryId) {
    throw new AppError('REPOSITORY_OFFLINE', 'another repository is mounted at this place', {
      details: { root: context.root, expected: context.marker.repositoryId, found: current.repositoryId },
    });
  }
  requireOwner(current, context.applianceId);
}

export function requireOwner(marker: RepositoryMarker, applianceId: ApplianceId): void {
  if (marker.ownerApplianceId === applianceId) return;
  throw new AppError('REPOSITORY_FOREIGN', 'the repository belongs to another appliance', {
    details: { repositoryId: marker.repositoryId, ownerApplianceId: marker.ownerApplianceId },
  });
}
