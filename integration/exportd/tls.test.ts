import { mkdir } from 'node:fs/promises';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import type { ExportDefinition } from '../../src/exports/index.js';
import { runTool } from '../../src/lib/process.js';
import { findLeftovers } from '../lab/leftovers.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { freePort } from '../lab/port.js';
import { definition, fileOf, makeImage, namesAt, sizeAt, startExportd, type ExportdRig } from './rig.js';
import { makeAuthority, makeKeys, type Authority } from './tls.js';

const SIZE = 16 * 1024 * 1024;
/** What libnbd says when the server breaks the handshake off; a client that refuses by itself says other things. */
const CUT_BY_SERVER = /TLS connection was non-properly terminated|Connection reset|alert/;
const TLS_DEMANDED = /server requires TLS/;

let directory: LabDirectory;
let authority: Authority;
let rig: ExportdRig;

beforeAll(async () => {
  directory = await makeLabDirectory();
  await makeImage(directory.file('disk.qcow2'), { pattern: 0x11 });
  authority = await makeAuthority(directory.file('ca'));
  await mkdir(directory.file('identities'));
});
afterEach(async () => {
  await rig.stop();
  expect(await findLeftovers(directory.path)).toEqual([]);
});
afterAll(() => directory[Symbol.asyncDispose]());

function withKey(port: number, user: string, keys: string): string {
  return `nbds://${user}@127.0.0.1:${port}/disk?tls-psk-file=${keys}`;
}

function withCertificate(port: number, client: string): string {
  return `nbds://127.0.0.1:${port}/disk?tls-certificates=${client}`;
}

async function startWith(name: string, settings: Record<string, unknown>, port?: number): Promise<void> {
  rig = await startExportd({
    directory: directory.file(name),
    settings,
    ...(port === undefined ? {} : { port }),
  });
  await rig.write('disk.conf', disk());
  expect(fileOf(await rig.reload(), 'disk.conf').state).toBe('served');
}

function disk(more: Partial<ExportDefinition> = {}): ExportDefinition {
  return definition('disk', directory.file('disk.qcow2'), more);
}

describe('the shared port', () => {
  test('with keys: the right one gets in; a wrong one, an unknown name and no TLS are refused by the server', async () => {
    const port = await freePort();
    const keysFile = await makeKeys(directory.file('shared.psk'), 'alice', 'carol');
    const tcp = { host: '0.0.0.0', port, tls: 'psk' };
    await startWith('psk', { tcp, tls: { psk: { keysFile } } }, port);
    expect(await sizeAt(withKey(port, 'alice', keysFile))).toBe(SIZE);
    expect(await sizeAt(withKey(port, 'carol', keysFile))).toBe(SIZE);
    const wrong = await makeKeys(directory.file('wrong.psk'), 'alice');
    await expect(sizeAt(withKey(port, 'alice', wrong))).rejects.toThrow(CUT_BY_SERVER);
    const unknown = await makeKeys(directory.file('unknown.psk'), 'mallory');
    await expect(sizeAt(withKey(port, 'mallory', unknown))).rejects.toThrow(CUT_BY_SERVER);
    await expect(sizeAt(rig.tcp('disk'))).rejects.toThrow(TLS_DEMANDED);
    expect(await sizeAt(rig.unix('disk'))).toBe(SIZE);
    expect((await rig.status()).listeners.map(({ id, tls }) => `${id} ${tls}`)).toEqual([
      'unix none',
      'tcp psk',
    ]);
  });

  test('with certificates: only the names that are listed get in', async () => {
    const port = await freePort();
    const [alice, bob] = [await authority.clientDirectory('alice'), await authority.clientDirectory('bob')];
    const x509 = { directory: authority.serverDirectory, clientNames: ['O=Lab,CN=alice'] };
    await startWith('x509', { tcp: { port, tls: 'x509' }, tls: { x509 } }, port);
    expect(await sizeAt(withCertificate(port, alice))).toBe(SIZE);
    await expect(sizeAt(withCertificate(port, bob))).rejects.toThrow(CUT_BY_SERVER);
    const stranger = await (await makeAuthority(directory.file('other-ca'))).clientDirectory('alice');
    await expect(sizeAt(withCertificate(port, stranger))).rejects.toThrow();
    await expect(sizeAt(rig.tcp('disk'))).rejects.toThrow(TLS_DEMANDED);
  });
});

describe('an export with an identity', () => {
  const psk = () => ({ tls: { psk: { identitiesDirectory: directory.file('identities') } } });

  test('is served on its own port to its own key, and nowhere else', async () => {
    const [agent, other] = [directory.file('identities/agent.psk'), directory.file('identities/other.psk')];
    await makeKeys(agent, 'agent');
    await makeKeys(other, 'other');
    await startWith('own', psk());
    const [port, otherPort] = [await freePort(), await freePort()];
    const own = (user: string, at: number) => ({
      identity: { kind: 'psk' as const, user },
      at: { port: at },
    });
    const mine = disk({ name: 'mine', own: own('agent', port) });
    await rig.write('mine.conf', mine);
    await rig.write('mine2.conf', { ...mine, name: 'mine2' });
    await rig.write('theirs.conf', disk({ name: 'theirs', own: own('other', otherPort) }));
    await rig.write('wrong.conf', disk({ name: 'wrong', own: own('other', port) }));
    const status = await rig.reload();
    expect(fileOf(status, 'mine.conf')).toMatchObject({ state: 'served', listeners: [`own:${port}`] });
    expect(fileOf(status, 'theirs.conf').listeners).toEqual([`own:${otherPort}`]);
    expect(fileOf(status, 'wrong.conf').error?.code).toBe('CONFLICT');
    const at = (user: string, keys: string) => withKey(port, user, keys).replace('/disk?', '/mine?');
    expect(await sizeAt(at('agent', agent))).toBe(SIZE);
    await expect(sizeAt(at('other', other))).rejects.toThrow(CUT_BY_SERVER);
    await expect(sizeAt(`nbd://127.0.0.1:${port}/mine`)).rejects.toThrow(TLS_DEMANDED);
    expect(await namesAt(rig.tcp(''))).toEqual(['disk']);
    expect(await namesAt(rig.unix(''))).toEqual(['disk']);
    expect(await sizeAt(at('agent', agent).replace('/mine?', '/mine2?'))).toBe(SIZE);
    await expect(sizeAt(at('agent', agent).replace('/mine?', '/disk?'))).rejects.toThrow();

    await rig.remove('mine.conf');
    await rig.remove('mine2.conf');
    const after = await rig.reload();
    // The port was the first one's; now the other may have it.
    expect(fileOf(after, 'wrong.conf').state).toBe('served');
    await expect(sizeAt(at('agent', agent))).rejects.toThrow(CUT_BY_SERVER);
    expect(await sizeAt(at('other', other).replace('/mine?', '/wrong?'))).toBe(SIZE);
  });

  test('gets a new key by SIGHUP: the old one is refused from then on', async () => {
    const keys = directory.file('identities/agent.psk');
    const old = await makeKeys(directory.file('old.psk'), 'agent');
    await runTool('cp', ['--preserve', old, keys], { timeoutMs: 5000 });
    await startWith('rotate', psk());
    const socket = directory.file('own.sock');
    const own = { identity: { kind: 'psk' as const, user: 'agent' }, at: { socket } };
    await rig.write('mine.conf', disk({ name: 'mine', own, isReadOnly: true }));
    expect(fileOf(await rig.reload(), 'mine.conf').listeners).toEqual([`own:${socket}`]);
    const at = (file: string) => `nbds+unix://agent@/mine?socket=${socket}&tls-psk-file=${file}`;
    expect(await sizeAt(at(old))).toBe(SIZE);
    await makeKeys(keys, 'agent');
    expect(fileOf(await rig.reload(), 'mine.conf').state).toBe('served');
    await expect(sizeAt(at(old))).rejects.toThrow(CUT_BY_SERVER);
    expect(await sizeAt(at(keys))).toBe(SIZE);
  });

  test('may be named by its certificate', async () => {
    const [dora, eve] = [await authority.clientDirectory('dora'), await authority.clientDirectory('eve')];
    await startWith('certificate', { tls: { x509: { directory: authority.serverDirectory } } });
    const port = await freePort();
    const identity = { kind: 'x509' as const, distinguishedName: 'O=Lab,CN=dora' };
    await rig.write('disk.conf', disk({ own: { identity, at: { port } } }));
    expect(fileOf(await rig.reload(), 'disk.conf').listeners).toEqual([`own:${port}`]);
    expect(await sizeAt(withCertificate(port, dora))).toBe(SIZE);
    await expect(sizeAt(withCertificate(port, eve))).rejects.toThrow(CUT_BY_SERVER);
    await expect(sizeAt(rig.tcp('disk'))).rejects.toThrow();
  });

  test('comes back with its exports when its storage daemon dies', async () => {
    const keys = await makeKeys(directory.file('identities/agent.psk'), 'agent');
    await startWith('revive', psk());
    const port = await freePort();
    const own = { identity: { kind: 'psk' as const, user: 'agent' }, at: { port } };
    await rig.write('mine.conf', disk({ name: 'mine', own }));
    const { listeners } = await rig.reload();
    process.kill(listeners.find(({ id }) => id === `own:${port}`)!.pid!, 'SIGKILL');
    const uri = withKey(port, 'agent', keys).replace('/disk?', '/mine?');
    await expect.poll(() => sizeAt(uri).catch(() => 0), { timeout: 5000 }).toBe(SIZE);
  });

  test.each([
    ['whose key is not there', 'nobody', /cannot be read: ENOENT/],
    ['whose key everybody may read', 'open', /everybody may use it/],
    ['whose file holds another key', 'strange', /one key, of the user strange/],
  ])('%s is its own error', async (_what, user, message) => {
    await makeKeys(directory.file('identities/strange.psk'), 'other');
    await makeKeys(directory.file('identities/open.psk'), 'open');
    await runTool('chmod', ['0644', directory.file('identities/open.psk')], { timeoutMs: 5000 });
    await startWith(`bad-${user}`, psk());
    const own = { identity: { kind: 'psk' as const, user }, at: { port: await freePort() } };
    await rig.write('mine.conf', disk({ name: 'mine', own }));
    const status = await rig.reload();
    expect(fileOf(status, 'mine.conf').error).toMatchObject({
      code: 'CONFIG_INVALID',
      message: expect.stringMatching(message) as string,
    });
    expect(fileOf(status, 'disk.conf').state).toBe('served');
    expect(status.listeners.map(({ id }) => id)).toEqual(['unix', 'tcp']);
  });
});
