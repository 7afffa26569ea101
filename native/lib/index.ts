/** The addon's door: libnbd's calls as promises, and the copy engine. See types.ts for the contract. */
import { addon } from './addon.js';
import { checkHash } from './session.js';
import type { HashAlgorithm } from './types.js';

export * from './types.js';
export { NbdError } from './errors.js';
export { connectNbd, listExports } from './handle.js';
export { openCopySession } from './session.js';

/** The hash of one block: XXH3-128 in canonical (big-endian) form, or SHA-256. */
export function hashBlock(algorithm: HashAlgorithm, data: Buffer): Buffer {
  if (!Buffer.isBuffer(data)) throw new TypeError('data must be a Buffer');
  return addon.hashBlock(checkHash(algorithm), data);
}

/** Version of the libnbd library that is loaded. */
export function libnbdVersion(): string {
  return addon.libnbdVersion();
}
