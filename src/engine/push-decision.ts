import type { DiskId } from '../lib/id.js';
import {
  decideUpon,
  fullUnlessInsisted,
  incremental,
  type CaptureDecision,
  type ParentInput,
} from './capture-decision.js';

/** Of a disk whose agent states no other. */
export function pushLineage(diskId: DiskId): string {
  return `push:${diskId}`;
}

export interface PushInput extends ParentInput {
  /** The change ids the agent can count from; null: it is believed to have the last point's. */
  changeIds: readonly string[] | null;
}

/**
 * Decides how one disk is pushed. Pure. Only the change id that the newest point was taken to is built upon: an
 * agent that has an older one alone reads a disk that was put back to an earlier state. Nobody compares: the
 * agent cannot read what the repository holds. With type `incremental` whatever would end in a full is an error.
 */
export function decidePush(input: PushInput): CaptureDecision {
  return decideUpon(input, (head) => {
    const [since] = head.ancestors;
    if (since === undefined || input.changeIds?.includes(since.changeIdTo) === false) {
      const sentence = `the agent cannot count from the last point (${since?.changeIdTo ?? ''})`;
      return fullUnlessInsisted(input, 'BITMAP_MISSING', sentence);
    }
    return incremental(head, since.changeIdTo, since);
  });
}
