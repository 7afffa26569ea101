import { isDeepStrictEqual } from 'node:util';
import type { ExportDefinition } from '../exports/index.js';
import { AppError } from '../lib/errors.js';
import { isSound, type Entry } from './entry.js';
import type { ScannedFile } from './scan.js';

export interface ReloadPlan {
  /** Every file of the directory, by name. Entries that stay as they are served are the old ones. */
  entries: Map<string, Entry>;
  /** What is served and no longer to be: its file is gone, bad, or says something else. */
  remove: Entry[];
  /** What is to be served and is not yet; also what failed before. */
  add: Entry[];
}

/** What a reading of the directory changes. The state that follows depends on the files, not on how they came about. */
export function planReload(served: ReadonlyMap<string, Entry>, files: readonly ScannedFile[]): ReloadPlan {
  const owners = nameOwners(served, files);
  const entries = new Map<string, Entry>();
  const add: Entry[] = [];
  for (const scanned of files) {
    const old = served.get(scanned.file);
    const next = judge(scanned, owners);
    if (
      old !== undefined &&
      isSound(old) &&
      isSound(next) &&
      isSameService(old.definition, next.definition)
    ) {
      const { digest, modifiedMs, definition } = next;
      entries.set(scanned.file, Object.assign(old, { digest, modifiedMs, definition }));
      continue;
    }
    entries.set(scanned.file, next);
    if (isSound(next)) add.push(next);
  }
  const remove = [...served.values()].filter((old) => isSound(old) && entries.get(old.file) !== old);
  return { entries, remove, add };
}

/** True when clients need not notice: an image is materialized while it is served. */
function isSameService(one: ExportDefinition, other: ExportDefinition): boolean {
  return isDeepStrictEqual({ ...one, materialize: false }, { ...other, materialize: false });
}

function judge(
  { file, digest, modifiedMs, content }: ScannedFile,
  owners: ReadonlyMap<string, string>,
): Entry {
  const base = { file, digest, modifiedMs, image: null, materialization: null };
  if (content instanceof AppError) return { ...base, definition: null, error: content };
  const owner = owners.get(content.name);
  if (owner === file) return { ...base, definition: content, error: null };
  return {
    ...base,
    definition: content,
    error: new AppError('CONFLICT', `the name ${content.name} is taken by ${String(owner)}`),
  };
}

/**
 * Which file has each name. Of several, the one that is served under it, so that a newcomer takes nobody's
 * clients away; else the one that was written first; else the first by its name.
 */
function nameOwners(
  served: ReadonlyMap<string, Entry>,
  files: readonly ScannedFile[],
): ReadonlyMap<string, string> {
  const isServed = (file: string, name: string): boolean => {
    const entry = served.get(file);
    return entry !== undefined && isSound(entry) && entry.definition.name === name;
  };
  const owners = new Map<string, ScannedFile>();
  for (const candidate of files) {
    if (candidate.content instanceof AppError) continue;
    const { name } = candidate.content;
    const holder = owners.get(name);
    const isFirst =
      holder === undefined ||
      (!isServed(holder.file, name) &&
        (isServed(candidate.file, name) || candidate.modifiedMs < holder.modifiedMs));
    if (isFirst) owners.set(name, candidate);
  }
  return new Map([...owners].map(([name, { file }]) => [name, file]));
}
