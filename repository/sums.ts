/** One cluster known to a `.sums` file. */
export interface SumsEntry {
  clusterIndex: number;
  isZero: boolean;
  /** Empty for a zero cluster. */
  hash: Buffer;
}

/** Appends packed entries (native `WindowResult.entries`) in ascending order; refuses anything else. */
export interface SumsWriter {
  append(entries: Buffer): Promise<void>;
  readonly entryCount: number;
}
