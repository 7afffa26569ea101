import { AppError } from '../src/lib/errors.js';
import type { PointId, VmId } from '../src/lib/id.js';
import { MIB } from '../src/lib/units.js';
import { TEMPORARY_PREFIX } from './backend.js';
import type { RepositoryContext } from './context.js';
import { configDirectory } from './layout.js';

/** A file of the machine's configuration that is kept with a point. */
export interface ConfigFile {
  name: string;
  content: Buffer;
}

/** Domain XML, firmware variables and TPM state are a few; a directory with more is none of ours. */
const MAX_FILES = 256;
/** The largest is a file of firmware variables: 4 MiB at most in today's firmware, 64 MiB on Arm. */
const MAX_FILE_BYTES = 64 * MIB;
const MAX_TOTAL_BYTES = 256 * MIB;

/** See Repository.readConfigFiles. */
export async function readConfigFiles(
  context: RepositoryContext,
  vmId: VmId,
  pointId: PointId,
): Promise<ConfigFile[]> {
  const directory = configDirectory(vmId, pointId);
  const entries = (await context.backend.list(directory)) ?? [];
  const names = entries.map(({ name }) => name).filter((name) => !name.startsWith(TEMPORARY_PREFIX));
  for (const { name, kind } of entries) {
    if (!names.includes(name)) continue;
    if (kind !== 'file' || name.startsWith('.'))
      throw unreadable(directory, `${name} is no configuration file`);
  }
  if (names.length > MAX_FILES) throw unreadable(directory, 'it holds too many files');
  const files: ConfigFile[] = [];
  let totalBytes = 0;
  for (const name of names.sort()) {
    const content = await context.backend.read(`${directory}/${name}`, { maxBytes: MAX_FILE_BYTES });
    if (content === undefined) throw unreadable(directory, `${name} went away while it was read`);
    totalBytes += content.length;
    if (totalBytes > MAX_TOTAL_BYTES) throw unreadable(directory, 'its files are too large together');
    files.push({ name, content });
  }
  return files;
}

function unreadable(directory: string, why: string): AppError {
  return new AppError('REPOSITORY_FORMAT', `${directory} cannot be used: ${why}`, { details: { directory } });
}
