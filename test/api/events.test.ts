import { afterEach, beforeEach, expect, test } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { newUlid } from '../../src/lib/id.js';
import { startFixture, type ApiFixture } from './fixture.js';

let api: ApiFixture;
let run: RunView;
beforeEach(async () => {
  api = await startFixture();
  const { json } = await api.call('POST', '/api/v1/repositories', { body: { name: 'm', root: '/r' } });
  const { id } = json as { id: string };
  run = (await api.call('POST', `/api/v1/repositories/${id}/rescan`)).json as RunView;
});
afterEach(async () => {
  await api[Symbol.asyncDispose]();
});

function open(signal: AbortSignal): Promise<Response> {
  return fetch(`${api.server.url}/api/v1/runs/${run.id}/events`, {
    headers: { authorization: `Bearer ${api.token}` },
    signal,
  });
}

function watching(count: number): Promise<true> {
  return pollUntil(() => (api.engine.watchers === count ? true : undefined), {
    timeoutMs: 5000,
    what: `${count} watchers`,
  });
}

test('the stream tells each change and ends after the run has', async () => {
  const response = await open(AbortSignal.timeout(10_000));
  expect(response.headers.get('content-type')).toBe('text/event-stream; charset=utf-8');
  const text = response.text();
  await watching(1);
  api.engine.moveRun(run.id, { state: 'running', stage: 'discover' });
  api.engine.moveRun(run.id, { state: 'completed', result: { kind: 'rescan', vms: 0, points: 0 } });
  const events = (await text).trim().split('\n\n');
  const data = events.map((event) => JSON.parse(event.split('data: ')[1]!) as RunView);
  expect(events.map((event) => event.split('\n').slice(0, 2))).toEqual([
    ['event: progress', 'id: 1'],
    ['event: progress', 'id: 2'],
    ['event: progress', 'id: 3'],
  ]);
  expect(data.map(({ state }) => state)).toEqual(['queued', 'running', 'completed']);
  await watching(0);
});

test('a client that leaves ends the watching', async () => {
  const leave = new AbortController();
  await open(leave.signal);
  await watching(1);
  leave.abort();
  await watching(0);
});

test('closing the server ends open streams at once', async () => {
  const response = await open(AbortSignal.timeout(10_000));
  await watching(1);
  const begin = performance.now();
  await api.server[Symbol.asyncDispose]();
  expect(performance.now() - begin).toBeLessThan(2000);
  expect(await response.text()).toContain('"state":"queued"');
  await watching(0);
});

test('a fault while watching is told as the last event', async () => {
  const failing = api.engine.watchRun.bind(api.engine);
  api.engine.watchRun = async function* (id, signal) {
    for await (const view of failing(id, signal)) {
      yield view;
      throw new Error('the database went away');
    }
  };
  const text = await (await open(AbortSignal.timeout(10_000))).text();
  expect(text).toContain('event: problem\nid: 2\n');
  expect(text).toContain('"code":"INTERNAL"');
  expect(text).not.toContain('went away');
});

test('an unknown run is a plain 404', async () => {
  const answer = await api.call('GET', `/api/v1/runs/${newUlid()}/events`);
  expect(answer.status).toBe(404);
  expect(answer.json).toMatchObject({ code: 'NOT_FOUND' });
});
