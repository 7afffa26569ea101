import { createBackupUseCases } from './backup-use-cases.js';
import type { EngineContext } from './context.js';
import { createHealthUseCases } from './doctor.js';
import type { Engine } from './engine.js';
import type { ActiveRuns } from './execute-run.js';
import { createExportUseCases } from './export-use-cases.js';
import { createMachineUseCases } from './machine-use-cases.js';
import { createOperationUseCases } from './operation-use-cases.js';
import { createPushUseCases } from './push-use-cases.js';
import { createRepositoryUseCases } from './repository-use-cases.js';
import { createRestoreUseCases } from './restore-use-cases.js';
import { createRunUseCases } from './run-use-cases.js';
import { createTokenUseCases } from './token-use-cases.js';
import { createVmUseCases } from './vm-use-cases.js';
import { createVolumeUseCases } from './volume-use-cases.js';

/** The use cases over one context; stateless but for the runs under way here. */
export function createEngine(context: EngineContext, active: ActiveRuns): Engine {
  const runs = createRunUseCases(context, active);
  return {
    ...createRepositoryUseCases(context),
    ...createVmUseCases(context),
    ...createVolumeUseCases(context),
    ...createMachineUseCases(context),
    ...createBackupUseCases(context),
    ...createPushUseCases(context),
    ...createRestoreUseCases(context),
    ...createExportUseCases(context),
    ...runs,
    ...createOperationUseCases(runs),
    ...createTokenUseCases(context),
    ...createHealthUseCases(context),
  };
}
