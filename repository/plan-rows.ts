import { COPY_OP, EXPECT_HASH } from '../src/nbd/index.js';

const ROW_FIELDS = 5;

/**
 * Builds the rows and expected hashes of one copy window, cluster by cluster in ascending order. Runs that
 * go on both on the disk and in the file become one row. Arrays are allocated once for the worst case.
 */
export class PlanRows {
  readonly #clusterBytes: number;
  readonly #diskBytes: number;
  readonly #stride: number;
  readonly #rows: Float64Array;
  readonly #expect: Buffer;
  #rowCount = 0;
  #clusterCount = 0;
  #copyBytes = 0;

  constructor(facts: { clusterBytes: number; diskBytes: number; hashBytes: number; maxClusters: number }) {
    this.#clusterBytes = facts.clusterBytes;
    this.#diskBytes = facts.diskBytes;
    this.#stride = 1 + facts.hashBytes;
    this.#rows = new Float64Array(facts.maxClusters * ROW_FIELDS);
    this.#expect = Buffer.alloc(facts.maxClusters * this.#stride);
  }

  get copyBytes(): number {
    return this.#copyBytes;
  }

  /** One cluster at `fileOffset` of a file. `kind` is EXPECT_*; with EXPECT_HASH the hash stands in `hashes` at `hashOffset`. */
  addCluster(
    place: { cluster: number; fileIndex: number; fileOffset: number; kind: number },
    hashes: Buffer,
    hashOffset: number,
  ): void {
    const offset = place.cluster * this.#clusterBytes;
    const length = Math.min(this.#clusterBytes, this.#diskBytes - offset);
    this.#addRow(offset, length, place);
    const at = this.#clusterCount * this.#stride;
    this.#expect[at] = place.kind;
    if (place.kind === EXPECT_HASH)
      hashes.copy(this.#expect, at + 1, hashOffset, hashOffset + this.#stride - 1);
    this.#clusterCount += 1;
    this.#copyBytes += length;
  }

  rows(): Float64Array {
    return this.#rows.slice(0, this.#rowCount * ROW_FIELDS);
  }

  expect(): Buffer {
    return this.#expect.subarray(0, this.#clusterCount * this.#stride);
  }

  #addRow(offset: number, length: number, place: { fileIndex: number; fileOffset: number }): void {
    const rows = this.#rows;
    const last = (this.#rowCount - 1) * ROW_FIELDS;
    if (last >= 0) {
      const lastLength = rows[last + 1] ?? 0;
      const continues =
        (rows[last] ?? 0) + lastLength === offset &&
        rows[last + 3] === place.fileIndex &&
        (rows[last + 4] ?? 0) + lastLength === place.fileOffset;
      if (continues) {
        rows[last + 1] = lastLength + length;
        return;
      }
    }
    const at = this.#rowCount * ROW_FIELDS;
    rows[at] = offset;
    rows[at + 1] = length;
    rows[at + 2] = COPY_OP.copy;
    rows[at + 3] = place.fileIndex;
    rows[at + 4] = place.fileOffset;
    this.#rowCount += 1;
  }
}
