/**
 * The import rule of the project:
 *
 *   main → app → {api, queue, cli} → engine → {repository, source, target, db, nbd} → lib
 *   nbd → native;  repository → lib, nbd;  source, target → nbd, libvirt;  libvirt → lib
 *   exportd → exports → nbd, lib: the export daemon runs without the rest
 *   volume → lib;  cli → capture → nbd: the capture agent runs without the daemon's parts
 *
 * A folder imports itself and what stands to its right, nothing else. Type-only imports count: a type
 * is as much a dependency on a folder's words as a call is. `config` is read by the entry points and
 * the composition root, and handed on as plain values.
 */
const FOLDERS = {
  lib: 'src/lib/',
  native: 'native/lib/',
  nbd: 'src/nbd/',
  repository: 'repository/(?!rescue-main[.]ts)',
  libvirt: 'src/libvirt/',
  source: 'src/source/',
  target: 'src/target/',
  db: 'src/db/',
  config: 'src/config/',
  exports: 'src/exports/',
  exportd: 'src/exportd/(?!main[.]ts)',
  volume: 'src/volume/',
  capture: 'src/capture/',
  engine: 'src/engine/',
  queue: 'src/queue/',
  api: 'src/api/',
  cli: 'src/cli/',
  app: 'src/(app|state-directory)[.]ts$',
  main: 'src/main[.]ts$',
  'exportd-main': 'src/exportd/main[.]ts$',
  rescue: 'repository/rescue-main[.]ts$',
};

const LEAVES = ['lib'];
const CONTRACTS = ['repository', 'source', 'target', 'exports', 'volume', 'db', 'nbd', ...LEAVES];
const MAY_IMPORT = {
  lib: [],
  // The addon's face is usable alone: what it needs of the project it is given.
  native: [],
  nbd: ['native', ...LEAVES],
  repository: ['nbd', ...LEAVES],
  // What both sides need of libvirt: virsh, domain XML.
  libvirt: LEAVES,
  source: ['nbd', 'libvirt', ...LEAVES],
  target: ['nbd', 'libvirt', ...LEAVES],
  db: LEAVES,
  config: LEAVES,
  // Names, files and status of exports: what the daemon and its publisher share.
  exports: ['nbd', ...LEAVES],
  exportd: ['exports', 'nbd', ...LEAVES],
  // Block devices of this host.
  volume: LEAVES,
  // The capture agent: it knows NBD, and the daemon through what it is given.
  capture: ['nbd', ...LEAVES],
  engine: CONTRACTS,
  queue: ['engine', ...CONTRACTS],
  api: ['engine', ...CONTRACTS],
  // A client of the REST API: of the API it knows the generated types alone (the rule below), and the
  // entry point starts with the settings.
  // The capture agent is one of its commands, and reads disks by itself.
  cli: ['capture', 'nbd', 'config', ...LEAVES],
  app: ['api', 'queue', 'cli', 'engine', 'config', ...CONTRACTS],
  main: ['app', 'config', ...LEAVES],
  'exportd-main': ['exportd', ...LEAVES],
  rescue: ['repository', 'target', 'nbd', ...LEAVES],
};

/** The database is an index of the repository: its rows are typed by the repository's words, no code is shared. */
const MAY_IMPORT_TYPES = { db: ['repository', 'nbd'] };

const folderRules = Object.entries(FOLDERS).map(([name, folder]) => {
  const typesOnly = MAY_IMPORT_TYPES[name] ?? [];
  const allowed = [name, ...MAY_IMPORT[name], ...typesOnly].map((other) => FOLDERS[other]);
  if (name === 'cli') allowed.push('src/api/generated[.]d[.]ts$');
  return {
    name: `import-rule-${name}`,
    comment: `${name} imports only: ${[name, ...MAY_IMPORT[name]].join(', ')}`,
    severity: 'error',
    from: { path: `^${folder}` },
    to: { path: '^(src|repository|native)/', pathNot: allowed.map((other) => `^${other}`) },
  };
});

const typesOnlyRules = Object.entries(MAY_IMPORT_TYPES).map(([name, others]) => ({
  name: `import-rule-${name}-types`,
  comment: `${name} imports only types from: ${others.join(', ')}`,
  severity: 'error',
  from: { path: `^${FOLDERS[name]}` },
  to: { path: others.map((other) => `^${FOLDERS[other]}`), dependencyTypesNot: ['type-only'] },
}));

/** A library has one owner: exchanging it, or its advisories, then concern one folder. */
const LIBRARY_OWNERS = [
  ['express', '(@types/)?(express|express-openapi-validator|helmet|swagger-ui-dist)', 'src/api/'],
  ['queue', '(bullmq|ioredis)', 'src/queue/'],
  ['database', '(knex|mysql2|(@types/)?better-sqlite3)', 'src/db/'],
  ['child-processes', 'execa', 'src/lib/process[.]ts$'],
  ['log', 'pino', 'src/lib/log[.]ts$'],
  ['command-line', 'commander', 'src/(cli/|main[.]ts$|exportd/main[.]ts$)|^repository/rescue-main[.]ts$'],
  ['api-client', 'openapi-fetch', 'src/cli/'],
  ['xml', '@xmldom/xmldom', 'src/libvirt/'],
];

const libraryRules = LIBRARY_OWNERS.map(([name, library, owner]) => ({
  name: `library-${name}`,
  comment: `${library} is imported only in ${owner}`,
  severity: 'error',
  from: { path: '^(src|repository|native)/', pathNot: `^${owner}` },
  to: { path: `^(node_modules/)?${library}(/|$)` },
}));

module.exports = {
  forbidden: [
    ...folderRules,
    ...typesOnlyRules,
    ...libraryRules,
    {
      name: 'child-process-core',
      comment: 'children are started only by src/lib/process.ts',
      severity: 'error',
      from: { path: '^(src|repository|native)/', pathNot: '^src/lib/process[.]ts$' },
      to: { path: '^(node:)?child_process$' },
    },
    {
      name: 'addon-binary',
      comment: 'the .node file is loaded only by native/lib',
      severity: 'error',
      from: { pathNot: '^native/lib/' },
      to: { path: '[.]node$|^native/build/' },
    },
    {
      name: 'known-folder',
      comment: 'a new folder needs a place in the import rule',
      severity: 'error',
      from: { path: '^(src|repository|native/lib)/', pathNot: Object.values(FOLDERS).map((it) => `^${it}`) },
      to: {},
    },
    {
      name: 'no-tests-in-product',
      comment: 'the product does not import tests, scripts or the lab',
      severity: 'error',
      from: { path: '^(src|repository|native)/' },
      to: { path: '^(test|integration|scripts|dist)/' },
    },
    { name: 'no-circular', severity: 'error', from: {}, to: { circular: true } },
    {
      name: 'resolvable',
      comment: 'an import that leads nowhere',
      severity: 'error',
      from: {},
      to: { couldNotResolve: true },
    },
    {
      name: 'no-development-packages',
      comment: 'the product runs with `npm ci --omit=dev`',
      severity: 'error',
      from: { path: '^(src|repository|native)/' },
      to: { dependencyTypes: ['npm-dev', 'npm-no-pkg', 'npm-unknown'], dependencyTypesNot: ['type-only'] },
    },
  ],
  options: {
    doNotFollow: { path: 'node_modules' },
    tsPreCompilationDeps: true,
    tsConfig: { fileName: 'tsconfig.json' },
    enhancedResolveOptions: {
      exportsFields: ['exports'],
      conditionNames: ['import', 'node', 'default', 'types'],
    },
  },
};
