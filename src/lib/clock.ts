/** The clock of the process, injected so that tests can move it. `Date.now()` is used nowhere else. */
export interface Clock {
  /** Wall time, milliseconds since the epoch, UTC. May jump. */
  nowMs(): number;
  /** Monotonic milliseconds with an arbitrary zero; for durations and rates. */
  monotonicMs(): number;
}

export const systemClock: Clock = {
  nowMs: () => Date.now(),
  monotonicMs: () => performance.now(),
};

/** RFC 3339 in UTC with milliseconds, the form of every stored and answered time. */
export function toTimestamp(ms: number): string {
  return new Date(ms).toISOString();
}
