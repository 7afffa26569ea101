import { execFile } from 'node:child_process';
import { once } from 'node:events';
import {
  chmod,
  chown,
  lstat,
  mkdir,
  readFile,
  readdir,
  rm,
  stat,
  statfs,
  symlink,
  writeFile,
} from 'node:fs/promises';
import net from 'node:net';
import path from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { pollUntil } from '../../src/lib/deadline.js';
import { newId, type RunId } from '../../src/lib/id.js';
import { runTool } from '../../src/lib/process.js';
import { connectNbd } from '../../src/nbd/index.js';
import { BASE_ALLOCATION } from '../../src/nbd/extents.js';
import { startQemuNbd } from '../../src/nbd/qemu-nbd.js';
import type { HypervisorHost } from '../../src/source/libvirt/hypervisor-host.js';
import { parseLibvirtUri } from '../../src/libvirt/libvirt-uri.js';
import { openLocalHost } from '../../src/source/libvirt/local-host.js';
import { openSshHost, type SshHostOptions } from '../../src/source/libvirt/ssh-host.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { findDescendants } from '../lab/leftovers.js';
import { pathExists } from '../lab/server.js';
import { startSshd, type LabSshd } from '../lab/sshd.js';

const MIB = 1024 * 1024;
const QEMU_USER = { uid: 64_055, gid: 64_055 };

let lab: LabDirectory;
let sshd: LabSshd;

const signal = new AbortController().signal;
const options = () => ({
  place: { runtimeDirectory: lab.file('rt'), owner: 'test' },
  timeoutMs: 10_000,
  signal,
});
const sshUri = (knownHosts = sshd.knownHostsFile) =>
  `qemu+ssh://root@127.0.0.1:${sshd.port}/system?keyfile=${sshd.keyFile}&known_hosts=${knownHosts}`;

async function openHost(uri: string, how: SshHostOptions): Promise<HypervisorHost> {
  const { host } = parseLibvirtUri(uri);
  return host === null ? openLocalHost(how) : openSshHost(host, how);
}

beforeAll(async () => {
  lab = await makeLabDirectory();
  // makeLabDirectory's is for its owner alone, and QEMU's user must get through.
  await chmod(lab.path, 0o711);
  await mkdir(lab.file('rt'), { mode: 0o700 });
  sshd = await startSshd(lab);
});

afterAll(async () => {
  await sshd[Symbol.asyncDispose]();
  await lab[Symbol.asyncDispose]();
});

describe.each([
  ['this host', () => 'qemu:///system'],
  ['a host behind ssh', () => sshUri()],
])('%s', (_name, uri) => {
  let host: HypervisorHost;
  let base: string;
  let runId: RunId;

  beforeAll(async () => {
    host = await openHost(uri(), options());
  });

  afterAll(async () => {
    await host[Symbol.asyncDispose]();
    expect(await readdir(lab.file('rt'))).toEqual([]);
  });

  beforeEach(() => {
    runId = newId<RunId>();
    base = lab.file(`scratch-${runId}`);
  });

  const make = (more: Partial<Parameters<HypervisorHost['makeRunDirectory']>[0]> = {}) =>
    host.makeRunDirectory({ base, runId, owner: QEMU_USER, scratch: [], ...more }, { signal });

  it('makes a directory that QEMU alone can work in, with its scratch files', async () => {
    const scratch = [
      { name: 'vda.qcow2', sizeBytes: 3 * MIB },
      { name: 'vdb.qcow2', sizeBytes: 1025 },
    ];
    const directory = await make({ scratch });
    expect(directory).toBe(path.join(base, runId));
    expect((await stat(base)).mode & 0o7777).toBe(0o711);
    expect(await stat(directory)).toMatchObject({ ...QEMU_USER, mode: 0o40700 });
    for (const { name } of scratch) expect(await stat(path.join(directory, name))).toMatchObject(QEMU_USER);
    const info = await runTool(
      'qemu-img',
      ['info', '--output=json', '-f', 'qcow2', path.join(directory, 'vda.qcow2')],
      {
        timeoutMs: 10_000,
      },
    );
    expect(JSON.parse(info.stdout)).toMatchObject({ 'virtual-size': 3 * MIB, format: 'qcow2' });
    // Not only by the modes: as that user.
    const asQemu = [
      '--reuid=64055',
      '--regid=64055',
      '--clear-groups',
      'touch',
      path.join(directory, 'nbd.sock'),
    ];
    await promisify(execFile)('setpriv', asQemu);
    await host.removeRunDirectory({ base, runId }, { signal });
    expect(await readdir(base)).toEqual([]);
    await host.removeRunDirectory({ base, runId }, { signal });
  });

  it('refuses a directory that is there, and leaves it as it is', async () => {
    const directory = await make();
    await writeFile(path.join(directory, 'x'), 'kept');
    await expect(make()).rejects.toMatchObject({ code: 'CONFLICT' });
    expect(await readFile(path.join(directory, 'x'), 'utf8')).toBe('kept');
  });

  it('leaves nothing when a scratch file cannot be made', async () => {
    const scratch = [
      { name: 'vda.qcow2', sizeBytes: MIB },
      { name: 'vdb.qcow2', sizeBytes: Number.MAX_SAFE_INTEGER },
    ];
    await expect(make({ scratch })).rejects.toThrow(/qemu-img|refused a command/);
    expect(await readdir(base)).toEqual([]);
  });

  it.each<[string, () => Promise<unknown>]>([
    ['a link', () => symlink(lab.file('rt'), base)],
    ['a file', () => writeFile(base, '')],
    ["another user's", () => mkdir(base).then(() => chown(base, 1234, 0))],
    ['writable by a group', () => mkdir(base).then(() => chmod(base, 0o775))],
    ['closed to QEMU', () => mkdir(base, { mode: 0o700 })],
    [
      "below another user's",
      async () => {
        await mkdir(`${base}-up/in`, { recursive: true });
        await chown(`${base}-up`, 1234, 0);
        base = `${base}-up/in/scratch`;
      },
    ],
    [
      'below one for everybody without the sticky bit',
      async () => {
        await mkdir(`${base}-up`);
        await chmod(`${base}-up`, 0o777);
        base = `${base}-up/scratch`;
      },
    ],
  ])('does not trust a base that is %s', async (_what, prepare) => {
    await prepare();
    await expect(make()).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
      details: { setting: 'snapshot.scratchDirectory' },
    });
    await expect(lstat(path.join(base, runId))).rejects.toThrow(/ENOENT|ENOTDIR/);
  });

  it('takes a base in a directory for everybody with the sticky bit, as /var/tmp is', async () => {
    await mkdir(`${base}-up`);
    await chmod(`${base}-up`, 0o1777);
    base = `${base}-up/scratch`;
    expect((await stat(await make())).uid).toBe(QEMU_USER.uid);
  });

  it('removes what lies in a run directory, follows no link and enters no directory', async () => {
    const directory = await make();
    const precious = lab.file(`precious-${runId}`);
    await mkdir(precious);
    await writeFile(path.join(precious, 'file'), 'kept');
    await symlink(precious, path.join(directory, 'link'));
    await writeFile(path.join(directory, ".odd 'name"), '');
    await host.removeRunDirectory({ base, runId }, { signal });
    expect(await pathExists(directory)).toBe(false);
    expect(await readFile(path.join(precious, 'file'), 'utf8')).toBe('kept');
    const again = await make();
    await mkdir(path.join(again, 'planted'));
    await expect(host.removeRunDirectory({ base, runId }, { signal })).rejects.toMatchObject({
      code: 'SOURCE_REFUSED',
    });
    expect((await lstat(path.join(again, 'planted'))).isDirectory()).toBe(true);
  });

  it('tells the room, often', async () => {
    const facts = await statfs(lab.path);
    const read = async () => (await host.capacity(lab.path, { signal }))!;
    const first = await read();
    expect(first.totalBytes).toBe(facts.blocks * facts.bsize);
    const big = lab.file(`big-${runId}`);
    await writeFile(big, Buffer.alloc(64 * MIB, 1));
    await pollUntil(async () => ((await read()).freeBytes <= first.freeBytes - 60 * MIB ? true : undefined), {
      timeoutMs: 5000,
      intervalMs: 50,
      what: 'the room getting less',
    });
    await rm(big);
    const ownChildren = () => readFile(`/proc/self/task/${process.pid}/children`, 'utf8');
    const before = await ownChildren();
    for (let i = 0; i < 5; i += 1) await read();
    expect(await ownChildren()).toBe(before);
    await expect(host.capacity(`${base}/none`, { signal })).rejects.toMatchObject({ code: 'SOURCE_REFUSED' });
  });

  it('reads bytes as they are, null what is absent, and no more than asked', async () => {
    const name = lab.file(`nv'ram ${runId}`);
    const content = Buffer.from(Array.from({ length: 70_000 }, (_value, index) => (index * 7) % 256));
    await writeFile(name, content);
    expect((await host.readFile(name, 70_000, { signal }))!.equals(content)).toBe(true);
    expect(await host.readFile(`${name}-none`, 10, { signal })).toBeNull();
    await expect(host.readFile(name, 69_999, { signal })).rejects.toMatchObject({ code: 'SOURCE_REFUSED' });
    await expect(host.readFile(lab.path, 10, { signal })).rejects.toThrow(/not a regular file/);
    await writeFile(name, '');
    expect((await host.readFile(name, 10, { signal }))!.length).toBe(0);
  });

  it('reaches a socket: an NBD server is read through it', async () => {
    const image = lab.file(`disk-${runId}`);
    await writeFile(image, Buffer.alloc(MIB, 0x5a));
    await using server = await startQemuNbd({
      ...{ imagePath: image, format: 'raw', isReadOnly: true, connections: 2 },
      ...{ runtimeDirectory: lab.path, owner: 'test' },
    });
    const socket = new URL(server.uri).searchParams.get('socket')!;
    {
      await using reached = await host.reach(socket, { signal });
      expect((await stat(reached.path)).isSocket()).toBe(true);
      await using handle = await connectNbd(
        {
          uri: `nbd+unix:///disk?socket=${encodeURIComponent(reached.path)}`,
          ...{ metaContexts: [BASE_ALLOCATION], connectTimeoutMs: 5000, requestTimeoutMs: 5000 },
        },
        { signal },
      );
      expect(handle.info.sizeBytes).toBe(MIB);
    }
    expect((await readdir(lab.file('rt'))).filter((name) => name.startsWith('f-'))).toEqual([]);
  });

  it('gives up when asked to', async () => {
    const control = new AbortController();
    control.abort();
    await expect(host.capacity(lab.path, { signal: control.signal })).rejects.toMatchObject({
      code: 'CANCELLED',
    });
  });
});

describe('logging in', () => {
  it('refuses a host whose key is another one, and one that is not known', async () => {
    await writeFile(lab.file('empty.known'), '');
    for (const file of [sshd.foreignHostsFile, lab.file('empty.known')]) {
      await expect(openHost(sshUri(file), options())).rejects.toMatchObject({
        code: 'SOURCE_REFUSED',
        message: expect.stringContaining('verification failed') as string,
      });
    }
    expect(await readdir(lab.file('rt'))).toEqual([]);
  });

  it('says that nobody is there', async () => {
    const uri = sshUri().replace(`:${sshd.port}/`, ':1/');
    await expect(openHost(uri, options())).rejects.toMatchObject({ code: 'SOURCE_UNREACHABLE' });
  });

  it('refuses without a key that fits', async () => {
    const other = lab.file('ssh/foreign');
    const uri = sshUri().replace(sshd.keyFile, other);
    await expect(openHost(uri, options())).rejects.toMatchObject({ code: 'SOURCE_REFUSED' });
  });

  it.each([
    'qemu+ssh://-oProxyCommand=x/system',
    'qemu+ssh://-l@host/system',
    'qemu+ssh://h/system?keyfile=/a%20b',
  ])('starts nothing for %s', async (uri) => {
    await expect(openHost(uri, options())).rejects.toMatchObject({ code: 'INVALID_INPUT' });
  });

  it('runs nothing that an odd name asks for', async () => {
    await using host = await openHost(sshUri(), options());
    const planted = lab.file('planted');
    const name = `${lab.path}/$(touch ${planted})'; touch ${planted}; '`;
    expect(await host.readFile(name, 10, { signal })).toBeNull();
    expect(await pathExists(planted)).toBe(false);
  });

  it('tells which of several sockets is there first', async () => {
    const { host } = parseLibvirtUri(sshUri());
    if (host === null) throw new Error('no host');
    await using afar = await openSshHost(host, options());
    const [absent, file, first, second] = ['absent', 'empty.known', 'a b.sock', 'c.sock'].map((it) =>
      lab.file(it),
    );
    const servers = [first, second].map((name) => net.createServer().listen(name));
    await Promise.all(servers.map((server) => once(server, 'listening')));
    const paths = [absent, file, first, second] as string[];
    expect(await afar.findSocket(paths, { signal })).toBe(first);
    for (const server of servers) server.close();
    expect(await afar.findSocket(paths, { signal })).toBeNull();
  });

  it('is noticed when the host is gone', async () => {
    const before = (await findDescendants()).length;
    const host = await openHost(sshUri(), options());
    await sshd.kill();
    await expect(host.capacity(lab.path, { signal })).rejects.toMatchObject({ code: 'SOURCE_UNREACHABLE' });
    await host[Symbol.asyncDispose]();
    expect((await findDescendants()).length).toBeLessThanOrEqual(before);
    await rm(lab.file('planted'), { force: true });
  });
});
