import type { VolumeId } from '../lib/id.js';
import type { RowPage, RowPageRequest } from './row-page.js';

export interface VolumeRow {
  id: VolumeId;
  /** Unique. */
  name: string;
  provider: string;
  /** Unique: the device wherever it is found, e.g. `wwn:0x5000…`. */
  identity: string;
  sizeBytes: number;
  createdAt: string;
  /** JSON: what else was known of the device when it was registered or last seen. */
  facts: unknown;
  mapping: DeviceMappingRow | null;
}

/** A volume that is attached: its device belongs to it alone. */
export interface DeviceMappingRow {
  /** Unique: no two volumes have one device node. Canonical, e.g. /dev/sdb. */
  devicePath: string;
  /** Unique: major:minor. */
  deviceNumber: string;
  attachedAt: string;
  /** When the device was last found to be the volume. */
  verifiedAt: string;
}

export interface VolumeTable {
  /** CONFLICT, with `details.field` name or identity and `details.volumeId`, when it is there. */
  insert(row: Omit<VolumeRow, 'mapping'>): Promise<void>;
  get(id: VolumeId): Promise<VolumeRow | null>;
  findByName(name: string): Promise<VolumeRow | null>;
  /** By id, oldest first. */
  list(page: RowPageRequest): Promise<RowPage<VolumeRow>>;
  listAttached(): Promise<VolumeRow[]>;
  /** NOT_FOUND when it is gone; CONFLICT as in `insert`. */
  update(
    id: VolumeId,
    change: Partial<Pick<VolumeRow, 'name' | 'identity' | 'sizeBytes' | 'facts'>>,
  ): Promise<void>;
  /**
   * Records the mapping of a volume that has none. CONFLICT, with `details.volumeId` and `devicePath`, when
   * another volume has the path or number, or the volume has one. NOT_FOUND when there is no volume.
   */
  attach(id: VolumeId, mapping: DeviceMappingRow): Promise<void>;
  /**
   * The mapping as it was found at a use: the device may have another letter now. CONFLICT as in `attach`,
   * NOT_FOUND when the volume is not attached.
   */
  updateMapping(id: VolumeId, mapping: DeviceMappingRow): Promise<void>;
  /** None there is fine. */
  detach(id: VolumeId): Promise<void>;
  /** CONFLICT while it is attached. False when there was none. */
  remove(id: VolumeId): Promise<boolean>;
}
