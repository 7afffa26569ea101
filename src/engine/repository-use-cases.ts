import path from 'node:path';
import { createRepository, openRepository, type Repository } from '../../repository/index.js';
import type { RepositoryRow } from '../db/database.js';
import { AppError, isErrorCode, toAppError } from '../lib/errors.js';
import { audit } from './audit.js';
import type { EngineContext } from './context.js';
import type { RepositoryId } from '../lib/id.js';
import type { Actor, Engine, NewRepository } from './engine.js';
import { startRun } from './run-use-cases.js';
import type { RepositoryView, RunView } from './types.js';
import { toRunError } from './views.js';

type RepositoryUseCases = Pick<
  Engine,
  'createRepository' | 'listRepositories' | 'getRepository' | 'checkRepository' | 'rescanRepository'
>;

export function createRepositoryUseCases(context: EngineContext): RepositoryUseCases {
  const { db } = context;
  const getRow = async (id: RepositoryRow['id']): Promise<RepositoryRow> => {
    const row = await db.repositories.get(id);
    if (row === null) throw new AppError('NOT_FOUND', `there is no repository ${id}`);
    return row;
  };
  return {
    async createRepository(input, actor) {
      requireUsableRoot(context, input.root);
      const repository = await makeOrOpen(context, input);
      const row: RepositoryRow = {
        id: repository.marker.repositoryId,
        name: input.name,
        root: path.normalize(input.root),
        hash: repository.marker.hash,
        createdAt: repository.marker.createdAt,
      };
      await db.repositories.insert(row);
      await audit(context, actor, {
        action: `repository.${input.mode}`,
        subject: row.id,
        details: { root: row.root, takeover: input.takeover },
      });
      if (input.mode === 'open') await startRescan(context, row.id, actor);
      return view(context, row);
    },
    async listRepositories(page) {
      const { rows, nextCursor } = await db.repositories.list(page);
      return { items: await Promise.all(rows.map((row) => view(context, row))), nextCursor };
    },
    async getRepository(id) {
      return view(context, await getRow(id));
    },
    async checkRepository(id, options, actor) {
      await getRow(id);
      return startRun(
        context,
        {
          kind: 'check',
          repositoryId: id,
          vmId: options.vmId,
          pointId: options.pointId,
          request: { kind: 'check', ...options },
          turn: 'none',
        },
        actor,
      );
    },
    async rescanRepository(id, actor) {
      await getRow(id);
      return startRescan(context, id, actor);
    },
  };
}

function startRescan(context: EngineContext, repositoryId: RepositoryId, actor: Actor): Promise<RunView> {
  return startRun(
    context,
    {
      kind: 'rescan',
      repositoryId,
      vmId: null,
      pointId: null,
      request: { kind: 'rescan' },
      turn: 'none',
    },
    actor,
  );
}

/** A repository inside the daemon's own state, or the other way round, would be removed with it. */
function requireUsableRoot(context: EngineContext, root: string): void {
  const normal = path.normalize(root);
  if (!path.isAbsolute(root) || root.includes('\u0000') || normal === '/') {
    throw new AppError('INVALID_INPUT', 'the root of a repository must be an absolute path', {
      details: { field: 'root' },
    });
  }
  const runtime = path.normalize(context.runtimeDirectory);
  if (normal === runtime || normal.startsWith(`${runtime}/`)) {
    throw new AppError('INVALID_INPUT', 'the runtime directory cannot hold a repository', {
      details: { field: 'root' },
    });
  }
}

async function makeOrOpen(context: EngineContext, input: NewRepository): Promise<Repository> {
  const { applianceId } = context;
  if (input.mode === 'create') return createRepository({ root: input.root, hash: input.hash, applianceId });
  return openRepository({ root: input.root, applianceId, takeover: input.takeover });
}

async function view(context: EngineContext, row: RepositoryRow): Promise<RepositoryView> {
  const facts = { id: row.id, name: row.name, root: row.root, hash: row.hash, createdAt: row.createdAt };
  try {
    return { ...facts, isOnline: true, capacity: await context.repositories.look(row.id), problem: null };
  } catch (error) {
    if (isErrorCode(error, 'DATABASE_UNAVAILABLE')) throw error;
    return { ...facts, isOnline: false, capacity: null, problem: toRunError(toAppError(error)) };
  }
}
