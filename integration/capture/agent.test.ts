import { readdir, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { BackupView, RunView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { MIB } from '../../src/lib/units.js';
import { setUp, type Setup } from '../daemon/daemon.js';
import { startExportRig, stopExportRig, type ExportRig } from '../daemon/export-rig.js';
import { expectPushFailed, expectPushGone, expectSoundRepository, pushDisk } from '../daemon/push-rig.js';
import { expectReadsBack, listPoints } from '../daemon/rig.js';
import { makeKeys } from '../exportd/tls.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { exportRaw, makeQcow2, makeRaw, qemuIo } from '../lab/disk-image.js';
import { answersOnSocket, startLabServer } from '../lab/server.js';
import { startSshd } from '../lab/sshd.js';
import { startStorageDaemon } from '../lab/storage-daemon.js';
import { startAgent, type Agent } from './agent.js';

const SILENCE_MS = 5000;
/** Not whole sectors. */
const DATA_BYTES = 40 * MIB + 1000;

let rig: ExportRig;
/** Of what stands for the hypervisor: its sockets are not the rig's. */
let site: LabDirectory;
let data: string;
beforeAll(async () => {
  rig = await startExportRig({ settings: { push: { silenceMs: SILENCE_MS } } });
  site = await makeLabDirectory();
  data = site.file('data.raw');
  await makeRaw({
    path: data,
    sizeBytes: DATA_BYTES,
    regions: [
      { offset: 0, length: 30 * MIB },
      { offset: DATA_BYTES - 1000, length: 1000 },
    ],
  });
});
afterAll(async () => {
  await site[Symbol.asyncDispose]();
  await stopExportRig(rig);
});

function newMachine(name: string, disks: Record<string, number>): Promise<Setup> {
  return setUp(rig.daemon, {
    root: rig.lab.file(`repository-${name}`),
    vmName: name,
    disks: Object.entries(disks).map(([disk, sizeBytes]) => ({ name: disk, source: pushDisk(sizeBytes) })),
  });
}

const pushData = (setup: Setup, ...more: string[]): Agent =>
  startAgent(rig, setup, ['--disk', `data=${data}`, '--format', 'raw', '--change-id', 'c1', ...more]);

/** Where agents have their sockets; the one that was killed leaves it to the next. */
async function socketDirectories(): Promise<string[]> {
  return (await readdir(rig.lab.path)).filter((name) => name.startsWith('holdfast-capture-'));
}

async function runOf(setup: Setup): Promise<RunView> {
  return pollUntil(
    async () => {
      const { items } = await rig.daemon.expect<{ items: RunView[] }>(200, 'GET', '/runs?limit=100');
      return items.find((run) => run.vmId === setup.vm.id && run.kind === 'backup');
    },
    { timeoutMs: 20_000, intervalMs: 50, what: 'the run of the agent' },
  );
}

/** The agent is in the middle of the copy. */
async function copying(setup: Setup): Promise<RunView> {
  const { id } = await runOf(setup);
  return pollUntil(
    async () => {
      const run = await rig.daemon.expect<RunView>(200, 'GET', `/runs/${id}`);
      return run.progress.disks.some(({ bytesWritten }) => bytesWritten > 0) ? run : undefined;
    },
    { timeoutMs: 20_000, intervalMs: 50, what: 'the agent copying' },
  );
}

async function expectCommitted(
  agent: Agent,
  setup: Setup,
  truths: Record<string, string>,
): Promise<BackupView> {
  expect(await agent.ended(), agent.output()).toBe(0);
  const [newest] = await listPoints(rig.daemon, setup);
  await expectPushGone(rig, setup);
  await expectReadsBack(rig, newest ?? '', truths);
  return rig.daemon.expect<BackupView>(200, 'GET', `/backups/${newest ?? ''}`);
}

describe('holdfast capture', () => {
  it('makes a full and then an incremental of two disks, by the bitmap the daemon knows', async () => {
    const sizeBytes = 64 * MIB;
    const image = site.file('vda.qcow2');
    await makeQcow2({ path: image, sizeBytes, regions: [{ offset: MIB, length: 20 * MIB }] });
    await using live = await startStorageDaemon({ image, socketPath: site.file('vda.sock') });
    await live.addBitmap('cp-1');
    const setup = await newMachine('two', { vda: sizeBytes, data: DATA_BYTES });
    const capture = async (changeId: string): Promise<BackupView> => {
      const truth = site.file(`vda-${changeId}.raw`);
      await exportRaw(live.uri, 'raw', truth);
      const agent = startAgent(rig, setup, [
        ...['--disk', `vda=${live.uri}`, '--disk', `data=${data}`, '--format', 'raw'],
        ...['--change-id', changeId],
      ]);
      return expectCommitted(agent, setup, { vda: truth, data });
    };
    const first = await capture('cp-1');
    expect([first.type, first.consistency]).toEqual(['full', 'crash']);
    await qemuIo({
      path: live.uri,
      format: 'raw',
      commands: ['write -P 0x42 2M 1M', 'write -z 8M 2M', 'write -P 1 63M 1M'],
    });
    await live.addBitmap('cp-2');
    const second = await capture('cp-2');
    const layers = Object.fromEntries(second.layers.map((layer) => [layer.diskName, layer]));
    expect(layers['vda']).toMatchObject({ method: 'bitmap', bytesRead: 2 * MIB, bytesWritten: 2 * MIB });
    expect(layers['data']).toMatchObject({ method: 'full', bytesWritten: 30 * MIB + 1000 });
    await expectSoundRepository(rig.daemon, setup);
  });

  it('goes on when the storage daemon is killed, and the point is the source', async () => {
    const setup = await newMachine('killed', { data: DATA_BYTES });
    const agent = pushData(setup, '--rate', '8MiB');
    await copying(setup);
    const { listeners } = await rig.exportd.status();
    process.kill(listeners.find(({ id }) => id === 'unix')!.pid!, 'SIGKILL');
    await agent.says(/disk data: .*\(NBD_\w+\); going on from/);
    const point = await expectCommitted(agent, setup, { data });
    expect(point.consistency).toBe('offline');
    await expectSoundRepository(rig.daemon, setup);
  });

  it('killed: the run fails by silence and everything is cleaned', async () => {
    const setup = await newMachine('dead', { data: DATA_BYTES });
    const agent = pushData(setup, '--rate', '2MiB');
    const run = await copying(setup);
    agent.process.kill('SIGKILL');
    await expectPushFailed(rig, setup, { run, code: 'PUSH_SILENT' });
    expect(await agent.ended()).toBeNull();
    expect(await socketDirectories()).toHaveLength(1);
    await expectCommitted(pushData(setup), setup, { data });
    expect(await socketDirectories()).toEqual([]);
  });

  it.each(['SIGINT', 'SIGTERM'] as const)(
    'on %s it cancels the run and ends within two seconds',
    async (signal) => {
      const setup = await newMachine(`stopped-${signal}`, { data: DATA_BYTES });
      const agent = pushData(setup, '--rate', '2MiB');
      const run = await copying(setup);
      const at = performance.now();
      agent.process.kill(signal);
      expect(await agent.ended()).toBe(130);
      expect(performance.now() - at).toBeLessThan(2000);
      expect(agent.output()).toContain('cancelled at the daemon');
      await expectPushFailed(rig, setup, { run, state: 'cancelled', code: 'CANCELLED' });
      expect(await socketDirectories()).toEqual([]);
    },
  );

  it('cancels a run that it does not know yet, too', async () => {
    const setup = await newMachine('overtaken', { data: DATA_BYTES });
    // Without an export daemon the answer to the request for the backup waits.
    process.kill(rig.exportd.pid, 'SIGSTOP');
    try {
      const agent = pushData(setup);
      const run = await runOf(setup);
      const at = performance.now();
      agent.process.kill('SIGINT');
      expect(await agent.ended(), agent.output()).toBe(130);
      expect(performance.now() - at).toBeLessThan(2000);
      expect(agent.output()).toContain('cancelled at the daemon');
      process.kill(rig.exportd.pid, 'SIGCONT');
      await expectPushFailed(rig, setup, { run, state: 'cancelled', code: 'CANCELLED' });
    } finally {
      process.kill(rig.exportd.pid, 'SIGCONT');
    }
  });

  it('ends when somebody cancels the run, and says so', async () => {
    const setup = await newMachine('cancelled', { data: DATA_BYTES });
    const agent = pushData(setup, '--rate', '2MiB');
    const run = await copying(setup);
    await rig.daemon.expect(202, 'POST', `/runs/${run.id}/cancel`);
    expect(await agent.ended()).toBe(5);
    await expectPushFailed(rig, setup, { run, state: 'cancelled', code: 'CANCELLED' });
  });

  it('cancels the run when it cannot go on', async () => {
    const setup = await newMachine('lost', { data: DATA_BYTES });
    const agent = pushData(setup, '--connect', 'nbd://127.0.0.1:1');
    expect(await agent.ended()).toBe(1);
    expect(agent.output()).toMatch(/the export for disk data: .*\(NBD_CONNECT\)/s);
    const run = await runOf(setup);
    await expectPushFailed(rig, setup, { run, state: 'cancelled', code: 'CANCELLED' });
  });

  it('goes through an ssh tunnel', async () => {
    await using sshd = await startSshd(site);
    const socketPath = site.file('tunnel.sock');
    const options = [`Port=${sshd.port}`, `UserKnownHostsFile=${sshd.knownHostsFile}`, 'BatchMode=yes'];
    await using _tunnel = await startLabServer(
      'ssh',
      [
        ...['-N', '-F', 'none', '-i', sshd.keyFile, '-L', `${socketPath}:127.0.0.1:${rig.exportd.port}`],
        ...options.flatMap((option) => ['-o', option]),
        'root@127.0.0.1',
      ],
      { isReady: () => answersOnSocket(socketPath, '', /^NBDMAGIC/) },
    );
    const setup = await newMachine('tunnel', { data: DATA_BYTES });
    const agent = pushData(setup, '--connect', `nbd+unix:///?socket=${socketPath}`);
    await expectCommitted(agent, setup, { data });
  });

  it('over TLS is let in by its own key alone', async () => {
    const { user, key } = await rig.daemon.expect<{ user: string; key: string }>(
      201,
      'POST',
      '/exports/identities',
      { user: 'agent7' },
    );
    const keys = site.file('agent7.psk');
    await writeFile(keys, `${user}:${key}\n`, { mode: 0o600 });
    const setup = await newMachine('tls', { data: DATA_BYTES });
    const identity = ['--psk-user', 'agent7'];

    const wrong = await makeKeys(site.file('wrong.psk'), 'agent7');
    const refused = pushData(setup, ...identity, '--tls-psk-file', wrong);
    expect(await refused.ended()).toBe(1);
    expect(refused.output()).toContain('NBD_CONNECT');
    await expectPushFailed(rig, setup, { run: await runOf(setup), state: 'cancelled', code: 'CANCELLED' });

    const none = pushData(setup, ...identity);
    expect(await none.ended()).toBe(2);
    expect(none.output()).toContain('the exports want TLS');
    await expectPushFailed(rig, setup, { run: await runOf(setup), state: 'cancelled', code: 'CANCELLED' });

    await expectCommitted(pushData(setup, ...identity, '--tls-psk-file', keys), setup, { data });
  });

  it('asks for nothing while the command line is wrong or a disk cannot be read', async () => {
    const setup = await newMachine('wrong', { data: DATA_BYTES });
    const cases: [string[], number, RegExp][] = [
      [['--disk', `data=${data}`, '--format', 'raw'], 2, /--change-id/],
      [['--disk', `data=${data}`, '--change-id', 'c1'], 2, /--format/],
      [['--disk', 'data=/no/such/file', '--format', 'raw', '--change-id', 'c1'], 1, /SOURCE_UNREACHABLE/],
      [['--disk', `other=${data}`, '--format', 'raw', '--change-id', 'c1'], 1, /no disk with the name/],
    ];
    for (const [args, code, words] of cases) {
      const agent = startAgent(rig, setup, args);
      expect([await agent.ended(), agent.output()]).toEqual([code, expect.stringMatching(words)]);
    }
    const { items } = await rig.daemon.expect<{ items: RunView[] }>(200, 'GET', '/runs?limit=100');
    expect(items.filter(({ vmId }) => vmId === setup.vm.id)).toEqual([]);
  });
});
