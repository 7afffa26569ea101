import type { Knex } from 'knex';
import type { Engine } from '../connection.js';
import { addColumns, createTable, type TableDefinition } from './table-definition.js';
import * as tables from './tables.js';

/** One change of the schema. Names are recorded in the database: never renamed, never reordered. */
export interface SchemaMigration {
  name: string;
  /** Must be repeatable on MariaDB, where a crash can come between the change and its record. */
  up: (db: Knex, engine: Engine) => Promise<void>;
}

function creation(name: string, table: TableDefinition): SchemaMigration {
  return { name, up: (db, engine) => createTable(db, engine, table) };
}

export const MIGRATIONS: readonly SchemaMigration[] = [
  creation('0001-repositories', tables.repositories),
  creation('0002-vms', tables.vms),
  creation('0003-vm-disks', tables.vmDisks),
  creation('0004-runs', tables.runs),
  creation('0005-run-events', tables.runEvents),
  creation('0006-recovery-points', tables.recoveryPoints),
  creation('0007-point-manifests', tables.pointManifests),
  creation('0008-layers', tables.layers),
  creation('0009-tokens', tables.tokens),
  creation('0010-idempotency-keys', tables.idempotencyKeys),
  creation('0011-audit-log', tables.auditLog),
  creation('0012-settings', tables.settings),
  {
    name: '0013-machines',
    up: async (db, engine) => {
      for (const addition of tables.machineColumns) await addColumns(db, engine, addition);
    },
  },
  creation('0014-exports', tables.exports),
  creation('0015-push-disks', tables.pushDisks),
  {
    name: '0016-volumes',
    up: async (db, engine) => {
      for (const table of [tables.volumes, tables.deviceMappings]) await createTable(db, engine, table);
    },
  },
];
