import type { ColumnAddition, TableDefinition } from './table-definition.js';

export const repositories: TableDefinition = {
  name: 'repositories',
  lines: (t) => [
    `id ${t.id} NOT NULL PRIMARY KEY`,
    `name ${t.text(255)} NOT NULL`,
    `name_key ${t.word(64)} NOT NULL UNIQUE`,
    `root ${t.text(1024)} NOT NULL`,
    `root_key ${t.word(64)} NOT NULL UNIQUE`,
    `hash ${t.word(16)} NOT NULL`,
    `created_at ${t.time} NOT NULL`,
  ],
};

export const vms: TableDefinition = {
  name: 'vms',
  lines: (t) => [
    `id ${t.id} NOT NULL PRIMARY KEY`,
    `name ${t.text(255)} NOT NULL`,
    `name_key ${t.word(64)} NOT NULL UNIQUE`,
    `created_at ${t.time} NOT NULL`,
  ],
};

export const vmDisks: TableDefinition = {
  name: 'vm_disks',
  lines: (t) => [
    `id ${t.id} NOT NULL PRIMARY KEY`,
    `vm_id ${t.id} NOT NULL`,
    `disk_number ${t.integer} NOT NULL`,
    `name ${t.text(255)} NOT NULL`,
    `name_key ${t.word(64)} NOT NULL`,
    `size_bytes ${t.integer} NOT NULL`,
    `lineage ${t.long} NOT NULL`,
    `source ${t.long} NOT NULL`,
    'UNIQUE (vm_id, disk_number)',
    'UNIQUE (vm_id, name_key)',
    'FOREIGN KEY (vm_id) REFERENCES vms (id)',
  ],
};

/**
 * pair_key names VM and repository of a run that takes turns with others of that pair; running_key is the same while the run is
 * running, and unique: the database itself lets only one run of a pair run.
 */
export const runs: TableDefinition = {
  name: 'runs',
  lines: (t) => [
    `id ${t.id} NOT NULL PRIMARY KEY`,
    `kind ${t.word(32)} NOT NULL`,
    `state ${t.word(32)} NOT NULL`,
    `stage ${t.word(32)}`,
    `vm_id ${t.id}`,
    `repository_id ${t.id}`,
    `point_id ${t.id}`,
    `pair_key ${t.word(52)}`,
    `running_key ${t.word(52)} UNIQUE`,
    `attempt ${t.integer} NOT NULL`,
    `created_at ${t.time} NOT NULL`,
    `started_at ${t.time}`,
    `ended_at ${t.time}`,
    `progress_at ${t.time}`,
    `is_cancel_requested ${t.boolean} NOT NULL`,
    `worker_id ${t.word(255)}`,
    `heartbeat_at ${t.time}`,
    `last_event ${t.integer} NOT NULL`,
    `request ${t.long} NOT NULL`,
    `progress ${t.long} NOT NULL`,
    `error ${t.long} NOT NULL`,
    `result ${t.long} NOT NULL`,
    'FOREIGN KEY (vm_id) REFERENCES vms (id)',
    'FOREIGN KEY (repository_id) REFERENCES repositories (id)',
  ],
  indexes: [
    ['created_at', 'id'],
    ['state', 'created_at', 'id'],
    ['kind', 'created_at', 'id'],
    ['vm_id', 'created_at', 'id'],
    ['repository_id'],
    ['pair_key', 'state'],
    ['point_id', 'state'],
  ],
};

export const runEvents: TableDefinition = {
  name: 'run_events',
  lines: (t) => [
    `run_id ${t.id} NOT NULL`,
    `sequence_number ${t.integer} NOT NULL`,
    `occurred_at ${t.time} NOT NULL`,
    `level ${t.word(16)} NOT NULL`,
    `code ${t.word(64)} NOT NULL`,
    `message ${t.long} NOT NULL`,
    `details ${t.long} NOT NULL`,
    'PRIMARY KEY (run_id, sequence_number)',
    'FOREIGN KEY (run_id) REFERENCES runs (id) ON DELETE CASCADE',
  ],
};

/** Narrow, so that lists and statistics touch few pages; the manifest stands in a table of its own. */
export const recoveryPoints: TableDefinition = {
  name: 'recovery_points',
  lines: (t) => [
    `id ${t.id} NOT NULL PRIMARY KEY`,
    `vm_id ${t.id} NOT NULL`,
    `repository_id ${t.id} NOT NULL`,
    `run_id ${t.id} NOT NULL`,
    `sequence_number ${t.integer} NOT NULL`,
    `point_type ${t.word(16)} NOT NULL`,
    `captured_at ${t.time} NOT NULL`,
    `committed_at ${t.time} NOT NULL`,
    `file_bytes ${t.integer} NOT NULL`,
    'FOREIGN KEY (vm_id) REFERENCES vms (id)',
    'FOREIGN KEY (repository_id) REFERENCES repositories (id)',
  ],
  indexes: [
    ['committed_at', 'id'],
    ['vm_id', 'committed_at', 'id'],
    ['repository_id', 'committed_at', 'id'],
    ['vm_id', 'repository_id', 'committed_at', 'id'],
  ],
};

export const pointManifests: TableDefinition = {
  name: 'point_manifests',
  lines: (t) => [
    `point_id ${t.id} NOT NULL PRIMARY KEY`,
    `manifest ${t.long} NOT NULL`,
    'FOREIGN KEY (point_id) REFERENCES recovery_points (id) ON DELETE CASCADE',
  ],
};

/** parent_layer_id is no foreign key: a rescan must be able to record a layer whose parent is lost. */
export const layers: TableDefinition = {
  name: 'layers',
  lines: (t) => [
    `id ${t.id} NOT NULL PRIMARY KEY`,
    `point_id ${t.id} NOT NULL`,
    `repository_id ${t.id} NOT NULL`,
    `disk_id ${t.id} NOT NULL`,
    `parent_layer_id ${t.id}`,
    'FOREIGN KEY (point_id) REFERENCES recovery_points (id) ON DELETE CASCADE',
    'FOREIGN KEY (repository_id) REFERENCES repositories (id)',
    'FOREIGN KEY (disk_id) REFERENCES vm_disks (id)',
  ],
  indexes: [['point_id'], ['repository_id'], ['disk_id'], ['parent_layer_id']],
};

export const tokens: TableDefinition = {
  name: 'tokens',
  lines: (t) => [
    `id ${t.id} NOT NULL PRIMARY KEY`,
    `name ${t.text(255)} NOT NULL`,
    `hash ${t.word(64)} NOT NULL UNIQUE`,
    `created_at ${t.time} NOT NULL`,
    `last_used_at ${t.time}`,
  ],
};

export const idempotencyKeys: TableDefinition = {
  name: 'idempotency_keys',
  lines: (t) => [
    `token_id ${t.id} NOT NULL`,
    `request_key ${t.text(255)} NOT NULL`,
    `unique_key ${t.word(64)} NOT NULL`,
    `request_hash ${t.word(64)} NOT NULL`,
    `created_at ${t.time} NOT NULL`,
    `status ${t.integer}`,
    `body ${t.long} NOT NULL`,
    'PRIMARY KEY (token_id, unique_key)',
    'FOREIGN KEY (token_id) REFERENCES tokens (id) ON DELETE CASCADE',
  ],
  indexes: [['created_at']],
};

export const auditLog: TableDefinition = {
  name: 'audit_log',
  lines: (t) => [
    `id ${t.serial}`,
    `occurred_at ${t.time} NOT NULL`,
    `actor ${t.text(255)} NOT NULL`,
    `action ${t.word(64)} NOT NULL`,
    `subject ${t.long} NOT NULL`,
    `details ${t.long} NOT NULL`,
  ],
};

export const settings: TableDefinition = {
  name: 'settings',
  lines: (t) => [`setting_key ${t.word(64)} NOT NULL PRIMARY KEY`, `setting_value ${t.long} NOT NULL`],
};

/** What discovery found. A VM or disk that was recorded by hand has none. */
export const machineColumns: ColumnAddition[] = [
  {
    table: 'vms',
    columns: (t) => ({ source_key: t.text(255), source: t.long, facts: t.long }),
    unique: ['source_key'],
  },
  { table: 'vm_disks', columns: (t) => ({ facts: t.long }) },
];

/** What an export is of are no foreign keys: a rescan replaces points, and an export outlives it. */
export const exports: TableDefinition = {
  name: 'exports',
  lines: (t) => [
    `id ${t.id} NOT NULL PRIMARY KEY`,
    `name ${t.word(64)} NOT NULL UNIQUE`,
    `kind ${t.word(16)} NOT NULL`,
    `state ${t.word(16)} NOT NULL`,
    `point_id ${t.id}`,
    `disk_id ${t.id}`,
    `run_id ${t.id}`,
    `volume_id ${t.id}`,
    `created_at ${t.time} NOT NULL`,
    `expires_at ${t.time}`,
    `facts ${t.long} NOT NULL`,
  ],
  indexes: [['created_at', 'id'], ['kind', 'created_at', 'id'], ['point_id'], ['run_id'], ['volume_id']],
};

export const pushDisks: TableDefinition = {
  name: 'push_disks',
  lines: (t) => [
    `run_id ${t.id} NOT NULL`,
    `disk_id ${t.id} NOT NULL`,
    `seen_at ${t.time} NOT NULL`,
    `progress ${t.long} NOT NULL`,
    `completion ${t.long}`,
    'PRIMARY KEY (run_id, disk_id)',
    'FOREIGN KEY (run_id) REFERENCES runs (id) ON DELETE CASCADE',
  ],
};

export const volumes: TableDefinition = {
  name: 'volumes',
  lines: (t) => [
    `id ${t.id} NOT NULL PRIMARY KEY`,
    `name ${t.text(255)} NOT NULL`,
    `name_key ${t.word(64)} NOT NULL UNIQUE`,
    `provider ${t.word(32)} NOT NULL`,
    `identity ${t.text(1024)} NOT NULL`,
    `identity_key ${t.word(64)} NOT NULL UNIQUE`,
    `size_bytes ${t.integer} NOT NULL`,
    `created_at ${t.time} NOT NULL`,
    `facts ${t.long} NOT NULL`,
  ],
};

/** The keys let a volume have one device, and a device one volume; a volume that has one cannot go. */
export const deviceMappings: TableDefinition = {
  name: 'device_mappings',
  lines: (t) => [
    `volume_id ${t.id} NOT NULL PRIMARY KEY`,
    `device_path ${t.text(4096)} NOT NULL`,
    `path_key ${t.word(64)} NOT NULL UNIQUE`,
    `device_number ${t.word(64)} NOT NULL UNIQUE`,
    `attached_at ${t.time} NOT NULL`,
    `verified_at ${t.time} NOT NULL`,
    'FOREIGN KEY (volume_id) REFERENCES volumes (id)',
  ],
};
