import { isUlid } from '../lib/id.js';
import { dataOf, type Api, type Schemas } from './client.js';
import { CliFailure, EXIT } from './failure.js';

const PAGE = 1000;

function notFound(what: string, text: string, list: string): CliFailure {
  return new CliFailure(`there is no ${what} with the name or id ${text}`, {
    exitCode: EXIT.failed,
    code: 'NOT_FOUND',
    remedy: `\`${list}\` shows those there are.`,
  });
}

/** The one thing of this id or name. A text that is the name of one and the id of another is an error. */
function pick<T extends { id: string; name: string }>(
  items: readonly T[],
  text: string,
  what: string,
): T | undefined {
  const found = items.filter((item) => item.id === text || item.name === text);
  if (found.length > 1) {
    throw new CliFailure(`${text} names ${found.length} of kind ${what}`, {
      exitCode: EXIT.failed,
      code: 'CONFLICT',
      remedy: `Use the id: ${found.map((item) => item.id).join(', ')}.`,
    });
  }
  return found[0];
}

/** All entries of a list that is answered in pages. */
async function collect<T>(
  getPage: (query: { limit: number; cursor?: string }) => Promise<{ items: T[]; nextCursor: string | null }>,
): Promise<T[]> {
  const items: T[] = [];
  for (let cursor: string | null = null, first = true; first || cursor !== null; first = false) {
    const page = await getPage({ limit: PAGE, ...(cursor === null ? {} : { cursor }) });
    items.push(...page.items);
    cursor = page.nextCursor;
  }
  return items;
}

export async function findVm(api: Api, text: string): Promise<Schemas['Vm']> {
  const items = await collect(async (query) => dataOf(await api.GET('/vms', { params: { query } })));
  const vm = pick(items, text, 'virtual machine');
  if (vm === undefined) throw notFound('virtual machine', text, 'holdfast vm list');
  return vm;
}

export async function findRepository(api: Api, text: string): Promise<Schemas['Repository']> {
  const items = await collect(async (query) => dataOf(await api.GET('/repositories', { params: { query } })));
  const repository = pick(items, text, 'repository');
  if (repository === undefined) throw notFound('repository', text, 'holdfast repository list');
  return repository;
}

export async function findExport(api: Api, text: string): Promise<Schemas['Export']> {
  const items = await collect(async (query) => dataOf(await api.GET('/exports', { params: { query } })));
  const found = pick(items, text, 'export');
  if (found === undefined) throw notFound('export', text, 'holdfast export list');
  return found;
}

export async function findVolume(api: Api, text: string): Promise<Schemas['Volume']> {
  const items = await collect(async (query) => dataOf(await api.GET('/volumes', { params: { query } })));
  const volume = pick(items, text, 'volume');
  if (volume === undefined) throw notFound('volume', text, 'holdfast volume list');
  return volume;
}

/** A source or target as it is, but for a volume, which is named by its id from here on. */
export async function resolveVolume<T extends { kind: string }>(api: Api, where: T): Promise<T> {
  if (where.kind !== 'volume' || !('volumeId' in where)) return where;
  return { ...where, volumeId: (await findVolume(api, String(where.volumeId))).id };
}

/** The disk of this name, number (`#0`) or id among those given. */
export function findDisk<T extends { id: string; name: string }>(disks: readonly T[], text: string): T {
  const disk = pick(disks, text, 'disk');
  if (disk !== undefined) return disk;
  throw new CliFailure(`there is no disk with the name or id ${text}`, {
    exitCode: EXIT.failed,
    code: 'NOT_FOUND',
    remedy: `The disks are: ${disks.map(({ name }) => name).join(', ')}.`,
  });
}

/** An id given on the command line, in its canonical form. */
export function parseId(text: string, what: string): string {
  const id = text.toUpperCase();
  if (!isUlid(id)) {
    throw new CliFailure(`${what} ${text} is not an id`, {
      exitCode: EXIT.usage,
      code: 'INVALID_INPUT',
      remedy: 'Ids have 26 characters; copy one from a list.',
    });
  }
  return id;
}
