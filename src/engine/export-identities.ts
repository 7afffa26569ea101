import { randomBytes, randomInt } from 'node:crypto';
import { link, open, readdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import type { ExportRow } from '../db/database.js';
import type { ExportIdentity } from '../exports/index.js';
import { AppError, errnoOf } from '../lib/errors.js';
import { newUlid } from '../lib/id.js';
import { audit } from './audit.js';
import type { EngineContext } from './context.js';
import type { Engine } from './engine.js';
import { factsOf } from './export-record.js';

type IdentityUseCases = Pick<
  Engine,
  'createExportIdentity' | 'listExportIdentities' | 'removeExportIdentity'
>;

/** As an export file can name it; GnuTLS takes no longer one. */
const USER = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;
const KEY_BYTES = 32;
const ENDING = '.psk';

export function createIdentityUseCases(context: EngineContext): IdentityUseCases {
  return {
    async createExportIdentity(user, actor) {
      const file = identityFile(context, user);
      const key = randomBytes(KEY_BYTES).toString('hex');
      await placeKey(file, `${user}:${key}\n`);
      await audit(context, actor, { action: 'export-identity.create', subject: user, details: {} });
      return { user, key };
    },
    async listExportIdentities() {
      const names = await readdir(identitiesDirectory(context));
      return names
        .filter((name) => name.endsWith(ENDING))
        .map((name) => name.slice(0, -ENDING.length))
        .filter((user) => USER.test(user))
        .sort()
        .map((user) => ({ user }));
    },
    async removeExportIdentity(user, actor) {
      const file = identityFile(context, user);
      const users = await exportsOf(context, { kind: 'psk', user });
      if (users.length > 0) {
        throw new AppError('CONFLICT', `${users.length} export(s) are for ${user}`, {
          details: { exportIds: users.map(({ id }) => id) },
        });
      }
      try {
        await rm(file);
      } catch (error) {
        if (errnoOf(error) !== 'ENOENT') throw error;
        throw new AppError('NOT_FOUND', `there is no identity ${user}`, { cause: error });
      }
      await audit(context, actor, { action: 'export-identity.remove', subject: user, details: {} });
    },
  };
}

/**
 * The port for exports of one identity: the one it has, or any that no export has. Any, not the first: one that
 * another program has would be chosen again and again.
 */
export async function choosePort(
  context: EngineContext,
  identity: ExportIdentity,
): Promise<{ port: number }> {
  const { ownPortsFrom, ownPorts } = context.settings.exports;
  const [same] = await exportsOf(context, identity);
  const at = same === undefined ? null : factsOf(same).at;
  if (at !== null) return at;
  const taken = new Set((await context.db.exports.listAll({})).map((row) => factsOf(row).at?.port));
  const free = Array.from({ length: ownPorts }, (_, index) => ownPortsFrom + index).filter(
    (port) => port <= 65_535 && !taken.has(port),
  );
  const port = free[free.length === 0 ? 0 : randomInt(free.length)];
  if (port === undefined) {
    throw new AppError('CONFLICT', `all ${ownPorts} ports for exports of one identity are taken`, {
      details: { ownPortsFrom, ownPorts },
    });
  }
  return { port };
}

async function exportsOf(context: EngineContext, identity: ExportIdentity): Promise<ExportRow[]> {
  const rows = await context.db.exports.listAll({});
  return rows.filter((row) => isDeepStrictEqual(factsOf(row).identity, identity));
}

function identitiesDirectory(context: EngineContext): string {
  const { identitiesDirectory: directory } = context.settings.exports;
  if (directory !== null) return directory;
  throw new AppError('CONFIG_INVALID', 'exports.identitiesDirectory is not set');
}

function identityFile(context: EngineContext, user: string): string {
  if (!USER.test(user)) {
    throw new AppError('INVALID_INPUT', 'a user has 1 to 128 letters, digits, `.`, `_` and `-`', {
      details: { field: 'user' },
    });
  }
  return path.join(identitiesDirectory(context), `${user}${ENDING}`);
}

/** The export daemon may read it at any time: it appears whole. */
async function placeKey(file: string, text: string): Promise<void> {
  const partial = path.join(path.dirname(file), `.${newUlid()}.partial`);
  try {
    const handle = await open(partial, 'wx', 0o640);
    try {
      await handle.writeFile(text);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await link(partial, file);
  } catch (error) {
    if (errnoOf(error) !== 'EEXIST') throw error;
    throw new AppError('CONFLICT', `there is an identity ${path.basename(file, ENDING)} already`, {
      cause: error,
    });
  } finally {
    await rm(partial, { force: true });
  }
}
