import { KIB } from '../lib/units.js';

/** How long NBD servers may take. */
export const LIMITS = { connectTimeoutMs: 10_000, requestTimeoutMs: 30_000, stallTimeoutMs: 60_000 };

/**
 * The fastest found against an export over TCP. With fewer bytes in flight on a connection the server's QEMU
 * leaves the window closed for some time after each filling: half the speed.
 */
export const COPY_SHAPE = { requestBytes: 256 * KIB, requestsInFlight: 32 };
