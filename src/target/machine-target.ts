import type { DiskId } from '../lib/id.js';
import type { TargetSpec } from './target.js';

/** Where a whole machine is restored to. */
export interface MachineTargetSpec {
  kind: 'libvirt';
  /** Connection URI of a libvirt of this host, e.g. `qemu:///system`. */
  uri: string;
  /** Null keeps the name it had. */
  name: string | null;
  /**
   * `new`: a machine beside the old one, with new UUID and MAC addresses. `same`: it keeps both, and no
   * domain with that UUID may be there. `replace`: in place of the domain with that UUID, which must be off.
   */
  identity: 'new' | 'same' | 'replace';
  /** Null with `replace`: the disks go where the domain has them. */
  place: { kind: 'directory'; path: string } | { kind: 'pool'; name: string } | null;
  /** Of disks that go to `place`; a disk in place of another keeps the format the domain has there. */
  format: 'qcow2' | 'raw';
  start: boolean;
}

export interface MachineTargetRequest {
  /** As kept with the point: `domain.xml`, `machine.json`, `nvram`, … */
  configFiles: readonly { name: string; content: Buffer }[];
  disks: readonly MachineTargetDisk[];
  signal: AbortSignal;
}

export interface MachineTargetDisk {
  diskId: DiskId;
  name: string;
  sizeBytes: number;
  /** A file of it will take about this much or more: the room that is asked for before anything is written. */
  leastBytes: number;
}

export interface RestoredMachine {
  name: string;
  uuid: string;
  isStarted: boolean;
}

/** Write side of the restore of a machine: says where each disk goes, and defines the machine once they are there. */
export interface MachineTarget {
  /** Refuses whatever can be refused before the first byte is written (CONFLICT, TARGET_EXISTS, INVALID_INPUT …). */
  prepare(request: MachineTargetRequest): Promise<PreparedMachine>;
}

/**
 * A machine that is about to be. In this order: disks are written, `confirm`, each disk appears under its own
 * name, `complete`, and `start` where that was asked. Disposal without `complete` takes back what was made;
 * files of disks belong to their own targets.
 */
export interface PreparedMachine extends AsyncDisposable {
  readonly disks: readonly { diskId: DiskId; target: TargetSpec }[];
  /** The disks go where the domain has them, over what is there. */
  readonly isInPlace: boolean;
  /** Sentences: in what the machine will differ from the one that was backed up, and what it uses of this host. */
  readonly notes: readonly string[];
  /** Looks again, before the first disk takes its place, whether the name is free or the domain still off. */
  confirm(): Promise<void>;
  /** Disks are complete: NVRAM in place, domain defined. Answers what is not as it should be beside that. */
  complete(): Promise<{ machine: RestoredMachine; notes: readonly string[] }>;
  /** TOOL_FAILED with libvirt's words when it does not start; it stays defined. */
  start(): Promise<void>;
}
