/** A block device as its provider found it just now. */
export interface BlockDevice {
  /** Canonical, e.g. /dev/sdb or /dev/dm-3; checked to be the node of this very device. */
  devicePath: string;
  /** major:minor. */
  deviceNumber: string;
  /** lsblk's word: disk, part, loop, lvm, crypt, mpath, raid1 … */
  type: string;
  /** Exact. */
  sizeBytes: number;
  isReadOnly: boolean;
  model: string | null;
  /**
   * `<kind>:<value>`, best first (see IDENTITY_KINDS). Another device may have one of them too: whoever takes
   * one for an identity looks through all devices (`devicesWith`). Empty for a path of a multipath device.
   */
  identities: string[];
  /**
   * This appearance of the device: the same text as long as it stays connected, and never again for another
   * one. Null where the kernel does not tell (before 5.15).
   */
  instance: string | null;
  /** The multipath device that it is one of the paths of. */
  pathOf: string | null;
  /** Why its content could not be looked at; identities that stand in the content are missing then. */
  problem: string | null;
}

/** Where volumes come from. */
export interface VolumeProvider {
  readonly name: 'host';
  /**
   * All block devices that are there now, by path. Rejects when they cannot be listed (TOOL_MISSING, TOOL_FAILED,
   * TIMEOUT); a single one that does not answer is in the list, with its problem.
   */
  list(control: { signal: AbortSignal }): Promise<BlockDevice[]>;
}

/**
 * Kinds of identities, best first. Those of `device` belong to the device itself, whatever is written to it; those
 * of `content` stand in what is written on it, and go and come with that: a copy has the same.
 */
export const IDENTITY_KINDS = {
  wwn: 'device',
  nvme: 'device',
  serial: 'device',
  'dm-uuid': 'device',
  'md-uuid': 'device',
  'part-uuid': 'content',
  'pt-uuid': 'content',
  'fs-uuid': 'content',
} as const satisfies Record<string, 'device' | 'content'>;
export type IdentityKind = keyof typeof IDENTITY_KINDS;

export const MAX_IDENTITY_LENGTH = 255;

export function identityKind(identity: string): IdentityKind | null {
  const kind = identity.slice(0, Math.max(0, identity.indexOf(':')));
  return Object.hasOwn(IDENTITY_KINDS, kind) ? (kind as IdentityKind) : null;
}

export function isContentIdentity(identity: string): boolean {
  const kind = identityKind(identity);
  return kind === null || IDENTITY_KINDS[kind] === 'content';
}

/** Several: the identity tells nothing. */
export function devicesWith(identity: string, devices: readonly BlockDevice[]): BlockDevice[] {
  return devices.filter(({ identities }) => identities.includes(identity));
}
