import { afterAll, beforeAll, beforeEach, expect, test } from 'vitest';
import { newUlid } from '../../src/lib/id.js';
import { SAMPLE_VM, startFixture, type ApiFixture } from './fixture.js';

let api: ApiFixture;
beforeAll(async () => {
  api = await startFixture();
});
beforeEach(() => {
  api.engine.reset();
});
afterAll(async () => {
  await api[Symbol.asyncDispose]();
});

const key = { 'Idempotency-Key': 'k-1' };

test('the same request with the same key is done once and answered the same', async () => {
  const first = await api.call('POST', '/api/v1/vms', { body: SAMPLE_VM, headers: key });
  const second = await api.call('POST', '/api/v1/vms', { body: SAMPLE_VM, headers: key });
  expect(second.status).toBe(201);
  expect(second.json).toEqual(first.json);
  expect(second.headers.get('location')).toBe(first.headers.get('location'));
  expect(api.engine.vms).toHaveLength(1);
});

test('another body or path with the same key is refused', async () => {
  await api.call('POST', '/api/v1/vms', { body: SAMPLE_VM, headers: key });
  const body = { ...SAMPLE_VM, name: 'other' };
  const answer = await api.call('POST', '/api/v1/vms', { body, headers: key });
  expect(answer.json).toMatchObject({ status: 409, code: 'IDEMPOTENCY_MISMATCH' });
});

test('keys of two tokens do not meet', async () => {
  const token = api.engine.addToken('other');
  await api.call('POST', '/api/v1/vms', { body: SAMPLE_VM, headers: key });
  await api.call('POST', '/api/v1/vms', { body: SAMPLE_VM, headers: key, token });
  expect(api.engine.vms).toHaveLength(2);
});

test('a failed request frees its key', async () => {
  const path = `/api/v1/repositories/${newUlid()}/rescan`;
  expect((await api.call('POST', path, { headers: key })).status).toBe(404);
  expect((await api.call('POST', path, { headers: key })).status).toBe(404);
});

test('a request that does not fit the schema does not take the key', async () => {
  expect((await api.call('POST', '/api/v1/vms', { body: {}, headers: key })).status).toBe(422);
  const answer = await api.call('POST', '/api/v1/vms', { body: SAMPLE_VM, headers: key });
  expect(answer.status).toBe(201);
});

test('making a token takes no key, because its text is not kept', async () => {
  const answer = await api.call('POST', '/api/v1/tokens', { body: { name: 'x' }, headers: key });
  expect(answer.json).toMatchObject({ status: 422, code: 'INVALID_INPUT' });
  expect(api.engine.tokens).toHaveLength(1);
});

test('a key that does not fit is refused', async () => {
  const headers = { 'Idempotency-Key': 'x'.repeat(256) };
  expect((await api.call('POST', '/api/v1/vms', { body: SAMPLE_VM, headers })).status).toBe(422);
});
