import type { SnapshotDisk, DiskProbe } from './source.js';

/** Reads one disk that stands for itself: an NBD export, an image. */
export interface DiskReader {
  /** Looks without keeping anything open. */
  probe(control: { signal: AbortSignal }): Promise<DiskProbe>;
  /** Starts what must be started (a private qemu-nbd); the endpoint is valid until disposal. */
  open(options: { bitmap: string | null; signal: AbortSignal }): Promise<OpenDisk>;
  /** The machine is off when its image can be opened: qemu's lock keeps a running one out. */
  readonly consistency: 'crash' | 'offline';
}

export interface OpenDisk extends AsyncDisposable {
  readonly endpoint: SnapshotDisk['endpoint'];
  /** The metadata context that carries the changes, when a bitmap was asked for. */
  readonly dirtyContext: string | null;
}
