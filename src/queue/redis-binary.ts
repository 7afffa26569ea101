import { constants } from 'node:fs';
import { access, mkdir, readlink, rm, symlink } from 'node:fs/promises';
import path from 'node:path';
import { AppError, errnoOf } from '../lib/errors.js';

const SERVER = 'redis-server';
/** Debian has one binary for server and tools that acts by the name it is started under; redis-tools brings it without a service. */
const MULTI_CALL_TOOL = 'redis-check-rdb';

/**
 * The path of an executable that is a Redis server: `redis-server` of the search path, else a
 * symbolic link of that name in `directory` to Debian's multi-call binary. TOOL_MISSING when there is neither.
 */
export async function findRedisServer(searchPath: readonly string[], directory: string): Promise<string> {
  const server = await findExecutable(searchPath, SERVER);
  if (server !== undefined) return server;
  const tool = await findExecutable(searchPath, MULTI_CALL_TOOL);
  if (tool === undefined) {
    throw new AppError('TOOL_MISSING', 'redis-server is not installed', { details: { tool: SERVER } });
  }
  await mkdir(directory, { recursive: true, mode: 0o700 });
  const link = path.join(directory, SERVER);
  if ((await readLinkTarget(link)) !== tool) {
    await rm(link, { force: true });
    await symlink(tool, link);
  }
  return link;
}

async function findExecutable(searchPath: readonly string[], name: string): Promise<string | undefined> {
  for (const directory of searchPath) {
    const file = path.join(directory, name);
    try {
      await access(file, constants.X_OK);
      return file;
    } catch (error) {
      if (!['ENOENT', 'EACCES', 'ENOTDIR'].includes(errnoOf(error) ?? '')) throw error;
    }
  }
  return undefined;
}

async function readLinkTarget(link: string): Promise<string | undefined> {
  try {
    return await readlink(link);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'EINVAL') return undefined;
    throw error;
  }
}
