import type { Engine } from '../engine/engine.js';
import type { Handlers } from './operation.js';
import { backupHandlers } from './routes/backups.js';
import { exportHandlers } from './routes/exports.js';
import { operationHandlers } from './routes/operations.js';
import { repositoryHandlers } from './routes/repositories.js';
import { restoreHandlers } from './routes/restores.js';
import { runHandlers } from './routes/runs.js';
import { systemHandlers } from './routes/system.js';
import { tokenHandlers } from './routes/tokens.js';
import { vmHandlers } from './routes/vms.js';
import { volumeHandlers } from './routes/volumes.js';

/** One handler for each operation of openapi.yaml; the compiler refuses a missing one and one too many. */
export function createHandlers(engine: Engine): Handlers {
  return {
    ...repositoryHandlers(engine),
    ...vmHandlers(engine),
    ...backupHandlers(engine),
    ...restoreHandlers(engine),
    ...exportHandlers(engine),
    ...volumeHandlers(engine),
    ...operationHandlers(engine),
    ...runHandlers(engine),
    ...tokenHandlers(engine),
    ...systemHandlers(engine),
  };
}
