import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { request } from 'node:https';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { startFixture } from './fixture.js';

let directory: string;
let tls: { certificate: string; key: string };
beforeAll(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'holdfast-tls-'));
  tls = { certificate: path.join(directory, 'cert.pem'), key: path.join(directory, 'key.pem') };
  await promisify(execFile)('openssl', [
    ...['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '1'],
    ...['-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost'],
    ...['-keyout', tls.key, '-out', tls.certificate],
  ]);
});
afterAll(async () => {
  await rm(directory, { recursive: true });
});

test('with certificate and key the API speaks TLS, and promises to go on doing so', async () => {
  await using api = await startFixture({ config: { listen: { host: '127.0.0.1', port: 0, tls } } });
  expect(api.server.url).toMatch(/^https:/);
  const ca = await readFile(tls.certificate);
  const answer = await new Promise<{ status: number | undefined; hsts: unknown }>((resolve, reject) => {
    const url = `https://localhost:${api.server.port}/api/v1/health`;
    request(url, { ca, agent: false, timeout: 10_000, family: 4 }, (response) => {
      response.resume();
      resolve({ status: response.statusCode, hsts: response.headers['strict-transport-security'] });
    })
      .on('error', reject)
      .end();
  });
  expect(answer.status).toBe(200);
  expect(answer.hsts).toContain('max-age');
});

test('a certificate that is none is a clear error', async () => {
  const broken = path.join(directory, 'broken.pem');
  await writeFile(broken, 'not a certificate');
  for (const certificate of [broken, '/nonexistent']) {
    const listen = { host: '127.0.0.1', port: 0, tls: { certificate, key: tls.key } };
    await expect(startFixture({ config: { listen } })).rejects.toMatchObject({ code: 'CONFIG_INVALID' });
  }
});
