import type { ExportDefinition, ExportFileStatus, MaterializeStatus } from '../exports/index.js';
import type { AppError } from '../lib/errors.js';
import type { ExportImage } from './image.js';
import type { Listener } from './listener.js';

/** How far an image that is to stand alone does. */
export interface Materialization {
  state: 'running' | 'completed' | 'failed';
  doneBytes: number;
  totalBytes: number;
  error: AppError | null;
}

/** An export file, and what became of it. */
export interface Entry {
  file: string;
  digest: string | null;
  modifiedMs: number;
  /** Null when the file could not be understood. */
  definition: ExportDefinition | null;
  /** How to open its image; null until that was looked at. */
  image: ExportImage | null;
  /** Why it is not served; null when nothing is known against it. */
  error: AppError | null;
  /** Null where the file does not ask for it. */
  materialization: Materialization | null;
}

/** An entry that is served, or is to be. */
export type SoundEntry = Entry & { definition: ExportDefinition; error: null };

export function isSound(entry: Entry): entry is SoundEntry {
  return entry.definition !== null && entry.error === null;
}

export function entryStatus(entry: Entry, listeners: Iterable<Listener>): ExportFileStatus {
  const { file, digest, definition, image, error, materialization } = entry;
  const name = definition?.name ?? null;
  const offering = isSound(entry)
    ? [...listeners].filter((listener) => listener.offers(entry.definition.name))
    : [];
  return {
    file,
    digest,
    name,
    state: error === null ? 'served' : 'failed',
    listeners: offering.map(({ id }) => id),
    sizeBytes: image?.sizeBytes ?? null,
    format: definition?.format ?? null,
    isReadOnly: definition?.isReadOnly ?? null,
    description: definition?.description ?? null,
    materialize: isSound(entry) ? materialization && materializeStatus(materialization) : null,
    error: errorStatus(error),
  };
}

function materializeStatus({ error, ...progress }: Materialization): MaterializeStatus {
  return { ...progress, error: errorStatus(error) };
}

function errorStatus(error: AppError | null): { code: string; message: string } | null {
  return error && { code: error.code, message: error.message };
}
