import { readdir } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import type { RepositoryView } from '../../src/engine/types.js';
import { KIB } from '../../src/lib/units.js';
import { SeededRandom } from '../lab/disk-image.js';
import { findDescendants } from '../lab/leftovers.js';
import { startSshd, type LabSshd } from '../lab/sshd.js';
import { expectSettled, findChildren, killDaemon } from './crash.js';
import { backUp, startBackup, type Answer, type Setup } from './daemon.js';
import {
  discoverOne,
  expectNoTrace,
  makeDomain,
  recordOf,
  startLiveRig,
  stopLiveRig,
  traces,
  type LiveDomain,
  type LiveRig,
} from './live-rig.js';
import { expectFailed, expectGoodBackup, methodsOf, waitUntilCopying } from './rig.js';

const BITMAP = ['bitmap BITMAP', 'bitmap BITMAP'];
const random = new SeededRandom(20261121);

let rig: LiveRig;
let sshd: LabSshd;
let machine: LiveDomain;
let repository: RepositoryView;
let setup: Setup;
/** Children of the daemon that belong to it and not to a run. */
let standing: number;

beforeAll(async () => {
  rig = await startLiveRig();
  sshd = await startSshd(rig.lab);
  machine = await makeDomain(rig, { name: 'afar' });
  repository = await rig.daemon.expect<RepositoryView>(201, 'POST', '/repositories', {
    name: 'afar',
    root: rig.lab.file('repository'),
  });
  standing = (await findDescendants(rig.daemon.pid)).length;
}, 60_000);

afterAll(async () => {
  await sshd[Symbol.asyncDispose]();
  await stopLiveRig(rig);
});

interface Way {
  knownHosts?: string;
  keyFile?: string;
  socket?: string;
}

function uriOf(way: Way = {}): string {
  const {
    knownHosts = sshd.knownHostsFile,
    keyFile = sshd.keyFile,
    socket = path.join(rig.libvirt.directory, 's/libvirt-sock'),
  } = way;
  const query = `keyfile=${keyFile}&known_hosts=${knownHosts}&socket=${socket}`;
  return `qemu+ssh://root@127.0.0.1:${sshd.port}/system?${query}`;
}

const discover = (uri: string): Promise<Answer> =>
  rig.daemon.request('POST', '/vms/discover', { kind: 'libvirt', uri, names: [] });

describe('a domain of another host', { timeout: 90_000 }, () => {
  afterEach(async () => {
    const sockets = await readdir(rig.lab.file('daemon/run'), { recursive: true });
    expect(sockets.filter((name) => /^[hf]-|\.xml$/.test(path.basename(name)))).toEqual([]);
    expect([...(await findChildren(rig, 'ssh')), ...(await findChildren(rig, 'virsh'))]).toEqual([]);
    expect(await findDescendants(rig.daemon.pid)).toHaveLength(standing);
  });

  it('is found by the name of its connection', async () => {
    setup = { repository, vm: await discoverOne(rig.daemon, uriOf(), 'afar') };
    expect(setup.vm.machine?.source).toMatchObject({ kind: 'libvirt', uri: uriOf() });
    expect(setup.vm.disks.map(({ name, sizeBytes }) => [name, sizeBytes])).toEqual([
      ['vda', 8192 * KIB],
      ['vdb', 8192 * KIB],
    ]);
  });

  it('is backed up while it runs, full and by what changed', async () => {
    await machine.work(random, 10);
    const first = await expectGoodBackup(rig, setup, { truths: machine.truths });
    expect(methodsOf(first)).toEqual(['full FIRST_POINT', 'full FIRST_POINT']);
    await expectNoTrace(rig, machine, [recordOf(first)]);
    await machine.work(random, 10);
    const second = await expectGoodBackup(rig, setup, { truths: machine.truths });
    expect(methodsOf(second)).toEqual(BITMAP);
    await expectNoTrace(rig, machine, [recordOf(second)]);
  });

  it('fails when the connection is lost; what was left goes with the next run, which counts on', async () => {
    const last = await backUp(rig.daemon, setup);
    await machine.work(random, 8);
    const run = await startBackup(rig.daemon, setup, { type: 'full', bytesPerSecond: 256 * KIB });
    await waitUntilCopying(rig.daemon, run.id);
    await sshd.kill();
    const started = performance.now();
    const failed = await expectFailed(rig, setup, { run, code: 'SNAPSHOT_LOST' });
    expect(failed.error?.message).toMatch(/ssh|watched/);
    // Nobody waits for what cannot come back.
    expect(performance.now() - started).toBeLessThan(8000);
    expect(await traces(machine)).not.toEqual([]);

    const unreachable = await expectFailed(rig, setup, {
      run: await startBackup(rig.daemon, setup),
      code: 'SOURCE_UNREACHABLE',
    });
    expect(unreachable.error?.message).toContain('Connection refused');

    await sshd.restart();
    await machine.work(random, 4);
    const next = await expectGoodBackup(rig, setup, { truths: machine.truths });
    expect(methodsOf(next)).toEqual(BITMAP);
    expect(recordOf(next)).not.toBe(recordOf(last));
    await expectNoTrace(rig, machine, [recordOf(next)]);
  });

  it('leaves nothing when the daemon is killed during the copy', async () => {
    const records = await machine.records();
    const truths = await machine.remember();
    const run = await startBackup(rig.daemon, setup, { type: 'full', bytesPerSecond: 256 * KIB });
    await waitUntilCopying(rig.daemon, run.id);
    await killDaemon(rig);
    await rig.restart();
    await expectSettled(rig, setup, { run, truths });
    await expectNoTrace(rig, machine, records);
    expect(methodsOf(await backUp(rig.daemon, setup))).toEqual(BITMAP);
  });

  it.each<[string, () => Way, string, RegExp]>([
    [
      'whose key is another one',
      () => ({ knownHosts: sshd.foreignHostsFile }),
      'SOURCE_REFUSED',
      /verification failed/,
    ],
    [
      'that does not let us in',
      () => ({ keyFile: rig.lab.file('ssh/foreign') }),
      'SOURCE_REFUSED',
      /Permission denied/,
    ],
    ['without libvirt', () => ({ socket: rig.lab.file('none') }), 'SOURCE_UNREACHABLE', /no libvirt daemon/],
  ])('is not looked for on a host %s', async (_name, way, code, words) => {
    const { body } = await discover(uriOf(way()));
    expect(body).toMatchObject({ code, detail: expect.stringMatching(words) as string });
  });

  it('is refused while it is off', async () => {
    await machine.stop();
    const run = await startBackup(rig.daemon, setup);
    const failed = await expectFailed(rig, setup, { run, code: 'SOURCE_REFUSED' });
    expect(failed.error?.message).toMatch(/disk vda is on another host|size of disk vda/);
  });
});
