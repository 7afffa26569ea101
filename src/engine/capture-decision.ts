import type {
  CaptureMethod,
  CaptureReason,
  CaptureReasonCode,
  ManifestDisk,
  PointManifest,
} from '../../repository/index.js';
import { AppError } from '../lib/errors.js';
import type { DiskId, LayerId, PointId } from '../lib/id.js';
import { pointOfBitmap } from '../source/bitmap-name.js';
import type { ChangeTracking, DiskProbe, StatedBitmap } from '../source/source.js';
import type { BackupType } from './types.js';

/** The newest layer of the disk and the points under it, newest first, whose change ids it may count from. */
export interface DiskHead {
  pointId: PointId;
  layerId: LayerId;
  sizeBytes: number;
  lineage: string;
  /** The head point and its ancestors in the same chain and lineage, newest first. */
  ancestors: { pointId: PointId; changeIdTo: string }[];
}

/** What says whether the last point can be built upon. */
export interface ParentInput {
  type: BackupType;
  diskName: string;
  probe: Pick<DiskProbe, 'sizeBytes' | 'lineage'>;
  head: DiskHead | null;
  /** Why the head's chain cannot be built upon, when it cannot. */
  damage: string | null;
}

export interface CaptureInput extends ParentInput {
  tracking: ChangeTracking;
  probe: DiskProbe;
  stated: StatedBitmap | null;
}

export interface CaptureDecision {
  method: CaptureMethod;
  reason: CaptureReason;
  parent: { pointId: PointId; layerId: LayerId; sizeBytes: number } | null;
  bitmap: string | null;
  changeIdFrom: string | null;
  /** The point at whose instant the bitmap began, in the parent's chain. */
  countsFrom: PointId | null;
}

/**
 * Decides how one disk is captured. Pure. A bitmap is used only when it provably began at the head
 * point or an ancestor of it (DESIGN.md, section 4); a full is chosen when nothing can be built upon;
 * everything else is compared with the last point. With type `incremental` whatever would end in a
 * full is an error instead.
 */
export function decideCapture(input: CaptureInput): CaptureDecision {
  return decideUpon(input, (head) => {
    if (input.stated !== null) return decideStated(input, head, input.stated);
    if (input.tracking === 'compare') {
      return compare(head, 'NO_CHANGE_RECORD', 'the disk is set to be compared with the last point');
    }
    return input.probe.recordKeeper === 'managed' ? decideManaged(input, head) : decideOffered(input, head);
  });
}

/** A full where the last point cannot be built upon, whatever is known of the changes; else what `decide` says. */
export function decideUpon(input: ParentInput, decide: (head: DiskHead) => CaptureDecision): CaptureDecision {
  const { head, probe, type } = input;
  if (type === 'full') return full('REQUESTED', 'a full backup was asked for');
  if (head === null) return fullUnlessInsisted(input, 'FIRST_POINT', 'there is no point to stand on yet');
  if (input.damage !== null) {
    return fullUnlessInsisted(
      input,
      'PARENT_DAMAGED',
      `the last point cannot be built upon: ${input.damage}`,
    );
  }
  if (head.lineage !== probe.lineage) {
    return fullUnlessInsisted(input, 'DISK_REPLACED', 'the disk is another one than at the last point');
  }
  if (probe.sizeBytes < head.sizeBytes) {
    return fullUnlessInsisted(
      input,
      'DISK_SHRANK',
      `the disk shrank from ${head.sizeBytes} to ${probe.sizeBytes} bytes`,
    );
  }
  return decide(head);
}

/**
 * Each point made its record, or says which one goes on: that one proves what changed, and no other. An
 * older one in its place belongs to a disk that was put back to an earlier state, which it knows nothing of.
 */
function decideManaged(input: CaptureInput, head: DiskHead): CaptureDecision {
  const changeId = head.ancestors[0]?.changeIdTo ?? '';
  const record = input.probe.records.find(({ bitmap }) => bitmap === changeId);
  const since = head.ancestors.find(({ pointId }) => pointId === pointOfBitmap(changeId));
  const isPossible = input.probe.noRecordReason === null;
  if (since === undefined || record === undefined || !isPossible) return decideUnrecorded(input, head);
  if (record.isInconsistent) {
    return fullUnlessInsisted(input, 'BITMAP_INCONSISTENT', `the bitmap ${record.bitmap} is inconsistent`);
  }
  return incremental(head, record.bitmap, since);
}

function decideUnrecorded(input: CaptureInput, head: DiskHead): CaptureDecision {
  const { noRecordReason } = input.probe;
  if (noRecordReason !== null) {
    return compare(head, 'NO_CHANGE_RECORD', `no record of changes: ${noRecordReason}`);
  }
  const sentence = 'the record of changes since the last point is gone';
  return input.tracking === 'bitmap'
    ? fullUnlessInsisted(input, 'BITMAP_MISSING', sentence)
    : compare(head, 'BITMAP_MISSING', sentence);
}

function decideStated(input: CaptureInput, head: DiskHead, stated: StatedBitmap): CaptureDecision {
  const record = input.probe.records.find(({ bitmap }) => bitmap === stated.name);
  if (record === undefined) {
    return fullUnlessInsisted(input, 'BITMAP_MISSING', `the source offers no bitmap ${stated.name}`);
  }
  if (record.isInconsistent) {
    return fullUnlessInsisted(input, 'BITMAP_INCONSISTENT', `the bitmap ${stated.name} is inconsistent`);
  }
  const since = head.ancestors.find(({ pointId }) => pointId === stated.sincePointId);
  if (since === undefined) {
    return compare(
      head,
      'BITMAP_UNPROVEN',
      `the bitmap ${stated.name} is said to count from a point the chain does not stand on`,
    );
  }
  return incremental(head, stated.name, since);
}

/** Among the offered bitmaps, the one that counts from the youngest point of the chain. */
function decideOffered(input: CaptureInput, head: DiskHead): CaptureDecision {
  const { records } = input.probe;
  for (const since of head.ancestors) {
    const record = records.find(({ bitmap }) => pointOfBitmap(bitmap) === since.pointId);
    if (record === undefined) continue;
    if (record.isInconsistent) {
      return fullUnlessInsisted(input, 'BITMAP_INCONSISTENT', `the bitmap ${record.bitmap} is inconsistent`);
    }
    return incremental(head, record.bitmap, since);
  }
  if (records.length > 0) {
    return compare(
      head,
      'BITMAP_UNPROVEN',
      'no bitmap of the source carries the id of a point of this chain, so nothing proves when it began',
    );
  }
  if (input.tracking === 'bitmap') {
    return fullUnlessInsisted(input, 'BITMAP_MISSING', 'the source offers no bitmap');
  }
  return compare(head, 'NO_CHANGE_RECORD', 'the source keeps no record of changes');
}

export function fullUnlessInsisted(
  input: ParentInput,
  code: CaptureReasonCode,
  sentence: string,
): CaptureDecision {
  if (input.type !== 'incremental') return full(code, sentence);
  const errorCode =
    code === 'BITMAP_MISSING' || code === 'BITMAP_INCONSISTENT' ? code : 'INCREMENTAL_IMPOSSIBLE';
  throw new AppError(errorCode, `disk ${input.diskName} cannot be captured incrementally: ${sentence}`, {
    details: { disk: input.diskName, reason: code },
  });
}

function full(code: CaptureReasonCode, sentence: string): CaptureDecision {
  return {
    method: 'full',
    reason: { code, sentence },
    parent: null,
    bitmap: null,
    changeIdFrom: null,
    countsFrom: null,
  };
}

function compare(head: DiskHead, code: CaptureReasonCode, sentence: string): CaptureDecision {
  return {
    method: 'compare',
    reason: { code, sentence },
    parent: parentOf(head),
    bitmap: null,
    changeIdFrom: null,
    countsFrom: null,
  };
}

export function incremental(
  head: DiskHead,
  bitmap: string,
  since: { pointId: PointId; changeIdTo: string },
): CaptureDecision {
  const sentence = `the bitmap ${bitmap} counts from point ${since.pointId}`;
  return {
    method: 'bitmap',
    reason: { code: 'BITMAP', sentence },
    parent: parentOf(head),
    bitmap,
    changeIdFrom: since.changeIdTo,
    countsFrom: since.pointId,
  };
}

function parentOf(head: DiskHead): CaptureDecision['parent'] {
  return { pointId: head.pointId, layerId: head.layerId, sizeBytes: head.sizeBytes };
}

/**
 * The head of a disk among a VM's points (ascending by sequence): the newest point that has the disk,
 * and the points its chain stands on as far as the lineage stays the same.
 */
export function findHead(points: readonly PointManifest[], diskId: DiskId): DiskHead | null {
  const byId = new Map(points.map((point) => [point.pointId, point]));
  const newest = points.findLast((point) => point.disks.some((disk) => disk.diskId === diskId));
  const headDisk = newest?.disks.find((disk) => disk.diskId === diskId);
  if (newest === undefined || headDisk === undefined) return null;
  const ancestors: DiskHead['ancestors'] = [];
  let next: PointId | null = newest.pointId;
  while (next !== null) {
    const disk: ManifestDisk | undefined = byId
      .get(next)
      ?.disks.find((candidate) => candidate.diskId === diskId);
    if (disk === undefined || disk.sourceLineage !== headDisk.sourceLineage) break;
    ancestors.push({ pointId: next, changeIdTo: disk.changeIdTo });
    next = disk.parentPointId;
  }
  return {
    pointId: newest.pointId,
    layerId: headDisk.layerId,
    sizeBytes: headDisk.sizeBytes,
    lineage: headDisk.sourceLineage,
    ancestors,
  };
}
