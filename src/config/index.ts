export { describeConfig, type ConfigRow } from './describe.js';
export { DEFAULT_CONFIG_FILE, isLoopback, loadConfig, type LoadOptions } from './load.js';
export { environmentName, ROLES, type Config, type Role } from './schema.js';
