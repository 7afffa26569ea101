import { toTimestamp } from '../lib/clock.js';
import type { EngineContext } from './context.js';
import type { Actor } from './engine.js';

/** Who did what, for the record. Details never hold secrets. */
export async function audit(
  context: EngineContext,
  actor: Actor | null,
  entry: { action: string; subject: string; details: Record<string, unknown> },
): Promise<void> {
  await context.db.auditLog.append({
    at: toTimestamp(context.clock.nowMs()),
    actor: actor === null ? 'holdfastd' : `${actor.tokenName} (${actor.tokenId})`,
    ...entry,
  });
}
