import { AppError } from '../lib/errors.js';
import type { DiskChoice, DiskView, SkipReasonCode, VmView } from './types.js';

/** A disk that is not part of a run, and why. */
export interface LeftOutDisk {
  disk: DiskView;
  reason: { code: SkipReasonCode; sentence: string };
}

export interface ChosenDisks {
  chosen: DiskView[];
  leftOut: LeftOutDisk[];
}

/** Whether a word of a user means this disk: its id, name, target or serial. */
function isMeant(disk: DiskView, word: string): boolean {
  return [disk.id, disk.name, disk.facts?.target, disk.facts?.serial].includes(word);
}

/**
 * Divides the disks of a VM. INVALID_INPUT for a word that means no disk, or one that cannot be backed up
 * (CD-ROM, passthrough); CONFLICT when nothing is left.
 */
export function chooseDisks(vm: VmView, choice: DiskChoice): ChosenDisks {
  for (const word of [...choice.include, ...choice.exclude]) {
    if (vm.disks.some((disk) => isMeant(disk, word))) continue;
    throw new AppError('INVALID_INPUT', `${vm.name} has no disk ${word}`, {
      details: { field: 'disks', word },
    });
  }
  const chosen: DiskView[] = [];
  const leftOut: LeftOutDisk[] = [];
  for (const disk of vm.disks) {
    const reason = reasonToLeave(vm, disk, choice);
    if (reason === null) chosen.push(disk);
    else leftOut.push({ disk, reason });
  }
  if (chosen.length === 0) throw new AppError('CONFLICT', `no disk of ${vm.name} is left to back up`);
  return { chosen, leftOut };
}

function reasonToLeave(vm: VmView, disk: DiskView, choice: DiskChoice): LeftOutDisk['reason'] | null {
  if (choice.exclude.some((word) => isMeant(disk, word))) {
    return { code: 'EXCLUDED', sentence: 'excluded for this run' };
  }
  const isIncluded = choice.include.some((word) => isMeant(disk, word));
  if (choice.include.length > 0 && !isIncluded) {
    return { code: 'NOT_INCLUDED', sentence: 'not among the disks named for this run' };
  }
  if (vm.machine !== null && disk.facts?.isPresent !== true) {
    return refuseIncluded(disk, isIncluded, {
      code: 'ABSENT',
      sentence: 'the machine does not have it any more',
    });
  }
  const skip = disk.facts?.skip ?? null;
  if (skip === null || (skip.code === 'OPTED_OUT' && isIncluded)) return null;
  return refuseIncluded(disk, isIncluded, skip);
}

function refuseIncluded(
  disk: DiskView,
  isIncluded: boolean,
  reason: LeftOutDisk['reason'],
): LeftOutDisk['reason'] {
  if (!isIncluded) return reason;
  throw new AppError('INVALID_INPUT', `disk ${disk.name} cannot be backed up: ${reason.sentence}`, {
    details: { field: 'disks', diskId: disk.id, reason: reason.code },
  });
}
