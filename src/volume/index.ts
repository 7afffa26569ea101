export { readInstance } from './device-facts.js';
export * from './host-provider.js';
export * from './provider.js';
