import { describe, expect, it } from 'vitest';
import { laneOf } from '../../src/engine/run-queue.js';
import { RUN_KINDS } from '../../src/engine/types.js';
import { newId } from '../../src/lib/id.js';
import { redisAddress } from '../../src/queue/index.js';
import { checkHandlers, LANE_QUEUES, QUEUE_NAMES, QUEUES } from '../../src/queue/queues.js';

describe('queues', () => {
  it('need exactly one handler each', () => {
    const one = QUEUE_NAMES.map((queue) => ({ queue }));
    expect(() => checkHandlers(one)).not.toThrow();
    expect(() => checkHandlers(one.slice(1))).toThrow(/queue runs has 0 handlers/);
    expect(() => checkHandlers([...one, { queue: 'runs' }])).toThrow(/queue runs has 2 handlers/);
  });

  it('are one for each lane', () => {
    expect(Object.values(LANE_QUEUES).sort()).toEqual([...QUEUE_NAMES].sort());
    expect(LANE_QUEUES.work).not.toBe(LANE_QUEUES.attended);
  });

  it.each(QUEUE_NAMES)('take payloads of ids only: %s', (name) => {
    const { payload } = QUEUES[name];
    const runId = newId();
    for (const kind of RUN_KINDS) expect(payload.safeParse({ runId, kind }).success, kind).toBe(true);
    for (const bad of [
      {},
      null,
      { runId: '../etc', kind: 'backup' },
      { runId, kind: 'format' },
      { runId, kind: 'backup', path: '/' },
    ]) {
      expect(payload.safeParse(bad).success).toBe(false);
    }
  });
});

describe('the lane of a run', () => {
  it('is attended for what mostly waits for others', () => {
    for (const kind of ['push', 'materialize', 'attach-volume', 'detach-volume'] as const) {
      expect(laneOf({ kind }), kind).toBe('attended');
    }
    for (const kind of ['backup', 'check', 'rescan', 'delete'] as const) {
      expect(laneOf({ kind }), kind).toBe('work');
    }
  });
});

describe('redisAddress', () => {
  const none = { url: null, socketPath: null };
  it('is the managed socket, or what is given, the socket first', () => {
    expect(redisAddress({ kind: 'managed', ...none }, '/run/r.sock')).toEqual({ socketPath: '/run/r.sock' });
    expect(redisAddress({ kind: 'given', url: 'redis://h', socketPath: '/s' }, '/run/r.sock')).toEqual({
      socketPath: '/s',
    });
    expect(redisAddress({ kind: 'given', ...none, url: 'redis://h' }, '/run/r.sock')).toEqual({
      url: 'redis://h',
    });
  });
  it('is refused when a given server has none', () => {
    expect(() => redisAddress({ kind: 'given', ...none }, '/run/r.sock')).toThrow(
      expect.objectContaining({ code: 'CONFIG_INVALID' }),
    );
  });
});
