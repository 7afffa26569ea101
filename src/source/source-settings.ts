import type { ServerPlace } from '../nbd/qemu-nbd.js';

/** Settings of sources, plain values from the configuration. Milliseconds and bytes. */
export interface SourceSettings {
  nbd: { connections: number; connectTimeoutMs: number; requestTimeoutMs: number };
  snapshot: {
    /** Of this host; each run has a directory of its own in it, named after the run. */
    scratchDirectory: string;
    scratchKeepFreePercent: number;
    /** Of this and the percentage the smaller one is kept free. */
    scratchKeepFreeBytes: number;
    commandTimeoutMs: number;
    agentTimeoutMs: number;
    freezeLimitMs: number;
    cbwTimeoutMs: number;
  };
}

/** What opening a source takes beside its description. */
export interface SourceOptions {
  settings: SourceSettings;
  place: ServerPlace;
}
