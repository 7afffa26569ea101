import { describe, expect, it } from 'vitest';
import { newId } from '../../src/lib/id.js';
import { redisAddress } from '../../src/queue/index.js';
import { checkHandlers, QUEUE_NAMES, QUEUES } from '../../src/queue/queues.js';

describe('queues', () => {
  it('need exactly one handler each', () => {
    const one = QUEUE_NAMES.map((queue) => ({ queue }));
    expect(() => checkHandlers(one)).not.toThrow();
    expect(() => checkHandlers(one.slice(1))).toThrow(/queue runs has 0 handlers/);
    expect(() => checkHandlers([...one, { queue: 'runs' }])).toThrow(/queue runs has 2 handlers/);
  });

  it('take payloads of ids only', () => {
    const { payload } = QUEUES.runs;
    const runId = newId();
    expect(payload.safeParse({ runId, kind: 'backup' }).success).toBe(true);
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
