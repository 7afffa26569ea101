import { afterAll, beforeAll, expect, test } from 'vitest';
import { parse } from 'yaml';
import { startFixture, type ApiFixture } from './fixture.js';

let api: ApiFixture;
beforeAll(async () => {
  api = await startFixture();
});
afterAll(async () => {
  await api[Symbol.asyncDispose]();
});

test('the page and everything it loads comes from this daemon, without a token', async () => {
  const page = await api.call('GET', '/docs/', { token: null });
  expect(page.status).toBe(200);
  expect(page.headers.get('content-security-policy')).toContain("default-src 'self'");
  const links = [...page.text.matchAll(/(?:href|src)="([^"]+)"/g)].map((match) => match[1]!);
  expect(links).toHaveLength(4);
  for (const link of links) {
    expect(link).toMatch(/^\/docs\//);
    expect((await api.call('GET', link, { token: null })).status, link).toBe(200);
  }
  expect(page.text).not.toMatch(/https?:/);
});

test('the initializer names the specification, which is served', async () => {
  const script = await api.call('GET', '/docs/swagger-initializer.js', { token: null });
  expect(script.text).toContain("url: '/openapi.yaml'");
  expect(script.text).toContain('validatorUrl: null');
  const spec = await api.call('GET', '/openapi.yaml', { token: null });
  expect(parse(spec.text)).toMatchObject({ openapi: '3.1.0' });
});

test('the root and /docs lead to the page', async () => {
  for (const path of ['/', '/docs']) {
    const answer = await api.call('GET', path, { token: null });
    expect(answer.status).toBe(308);
    expect(answer.headers.get('location')).toBe('/docs/');
  }
});

test('no answer names the software, and API answers are not cached', async () => {
  const answer = await api.call('GET', '/api/v1/runs');
  expect(answer.headers.get('x-powered-by')).toBeNull();
  expect(answer.headers.get('cache-control')).toBe('no-store');
  expect(answer.headers.get('x-content-type-options')).toBe('nosniff');
  expect(answer.headers.get('strict-transport-security')).toBeNull();
});
