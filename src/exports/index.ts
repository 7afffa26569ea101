export * from './export-daemon.js';
export * from './export-directory.js';
export * from './export-file.js';
export * from './export-name.js';
export * from './export-status.js';
