import { readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { ExportView, VolumeView } from '../../src/engine/types.js';
import { newUlid, type PointId } from '../../src/lib/id.js';
import {
  addRepository,
  addVm,
  nextRun,
  startCliFixture,
  type CliFixture,
  type CliResult,
} from './fixture.js';

let cli: CliFixture;
beforeAll(async () => {
  cli = await startCliFixture();
});
beforeEach(() => {
  cli.api.engine.reset();
});
afterAll(async () => {
  await cli[Symbol.asyncDispose]();
});

const NOTHING = {
  ...{ pointId: null, disk: null, volumeId: null, isReadOnly: true },
  ...{ overlayPath: null, ttlSeconds: null, identity: null },
};

async function publish(...options: string[]): Promise<ExportView> {
  const { json, code } = await cli.run(['export', 'publish', newUlid(), ...options, '--json']);
  expect(code).toBe(0);
  return json as ExportView;
}

/** The volume in the engine itself: what a test changes in it is answered. */
async function addVolume(): Promise<VolumeView> {
  expect((await cli.run(['volume', 'add', '/dev/sdb', '--name', 'archive'])).code).toBe(0);
  return cli.api.engine.volumes[0]!;
}

describe('export publish', () => {
  test('prints the addresses and lines to paste', async () => {
    const pointId = newUlid();
    const result = await cli.run(['export', 'publish', pointId.toLowerCase(), '--disk', 'vda']);
    expect(result.code).toBe(0);
    expect(cli.api.engine.requests).toEqual([{ ...NOTHING, pointId, disk: 'vda' }]);
    const [made] = cli.api.engine.exports;
    expect(result.stdout).toContain(`uri      ${made!.uris[0]!}\n`);
    expect(result.stdout).toContain(`\n  nbdinfo '${made!.uris[0]!}'\n`);
    expect(result.stdout).toContain(
      `\n  qemu-system-x86_64 -m 2G -drive 'file=${made!.uris[0]!},format=raw,if=virtio,readonly=on'\n`,
    );
  });

  test('takes every choice', async () => {
    const volume = await addVolume();
    cli.api.engine.requests.length = 0;
    const pointId = newUlid();
    const overlay = ['--writable', '--overlay', '/srv/o.qcow2', '--ttl', '0', '--psk-user', 'agent7'];
    const writable = await cli.run(['export', 'publish', pointId, ...overlay]);
    await cli.run(['export', 'publish', '--volume', 'archive', '--x509-name', 'O=E,CN=a', '--ttl', '2h']);
    expect(cli.api.engine.requests).toEqual([
      {
        ...{ ...NOTHING, pointId, isReadOnly: false, overlayPath: '/srv/o.qcow2', ttlSeconds: 0 },
        identity: { kind: 'psk', user: 'agent7' },
      },
      {
        ...{ ...NOTHING, volumeId: volume.id, ttlSeconds: 7200 },
        identity: { kind: 'x509', distinguishedName: 'O=E,CN=a' },
      },
    ]);
    expect(writable.stdout).toMatch(/^for\s+psk user agent7$/m);
    expect(writable.stdout).toMatch(/^expires\s+never$/m);
    expect(writable.stdout).toContain("format=raw,if=virtio'");
  });

  test('shows a client of TLS where its credentials go', async () => {
    const { id } = await publish('--psk-user', 'agent7');
    Object.assign(cli.api.engine.exports[0]!, { uris: ['nbds://[2001:db8::1]:10811/x'] });
    const psk = await cli.run(['export', 'show', id]);
    expect(psk.stdout).toContain('nbds://[2001:db8::1]:10811/x');
    const text = await example('nbds://[2001:db8::1]:10811/x', '--psk-user', 'agent7');
    expect(text).toContain(
      "nbdinfo 'nbds://agent7@[2001:db8::1]:10811/x?tls-psk-file=/etc/holdfast/keys.psk'",
    );
    expect(text).toContain(
      "-object 'tls-creds-psk,id=tls0,endpoint=client,dir=/etc/holdfast,username=agent7'",
    );
    expect(text).toContain(
      "-blockdev 'driver=nbd,node-name=disk0,server.type=inet,server.host=2001:db8::1,server.port=10811," +
        "export=x,tls-creds=tls0,read-only=on' -device virtio-blk-pci,drive=disk0",
    );
    const x509 = await example('nbds://h:1/x', '--x509-name', 'CN=a', '--writable');
    expect(x509).toContain("nbdinfo 'nbds://h:1/x?tls-certificates=/etc/pki/holdfast'");
    expect(x509).toContain("'tls-creds-x509,id=tls0,endpoint=client,dir=/etc/pki/holdfast'");
    expect(x509).not.toContain('read-only');
    const unix = await example("nbd+unix:///x?socket=/run/it's.sock");
    expect(unix).toContain(String.raw`nbdinfo 'nbd+unix:///x?socket=/run/it'\''s.sock'`);
  });

  /** What is printed for an export at this address. */
  async function example(uri: string, ...options: string[]): Promise<string> {
    const { engine } = cli.api;
    const createExport = engine.createExport.bind(engine);
    engine.createExport = async (input) => ({ ...(await createExport(input)), uris: [uri] });
    const { stdout } = await cli.run(['export', 'publish', newUlid(), ...options]);
    engine.createExport = createExport;
    return stdout;
  }

  test.each([
    [[]],
    [['x']],
    [[newUlid(), '--volume', 'archive']],
    [['--volume', 'archive', '--disk', 'vda']],
    [['--volume', 'archive', '--writable', '--overlay', '/srv/o']],
    [[newUlid(), '--overlay', '/srv/o']],
    [[newUlid(), '--ttl', '1']],
    [[newUlid(), '--ttl', '1w']],
    [[newUlid(), '--ttl', '-1h']],
    [[newUlid(), '--psk-user', 'a', '--x509-name', 'CN=a']],
  ])('with %j is wrong usage', async (args) => {
    expect((await cli.run(['export', 'publish', ...args])).code).toBe(2);
    expect(cli.api.engine.requests).toEqual([]);
  });

  test('what the daemon refuses is told with code and remedy', async () => {
    const refused = await cli.run(['export', 'publish', newUlid(), '--psk-user', '../x']);
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain('INVALID_INPUT');
    const { pointId, id } = await publish();
    const again = await cli.run(['export', 'publish', pointId!]);
    expect(again.code).toBe(1);
    expect(again.stderr).toContain('(CONFLICT)');
    expect(again.stderr).toContain(`exportId: ${id}`);
  });
});

describe('exports', () => {
  test('are listed, shown by name or id, and removed', async () => {
    const made = await publish('--writable');
    await publish();
    const list = await cli.run(['export', 'list', '--point', made.pointId!]);
    expect(list.stdout.split('\n')).toEqual([
      `ID${' '.repeat(26)}KIND   STATE      ACCESS     SIZE  EXPIRES               WHERE`,
      `${made.id}  point  published  write   8.0 GiB  2026-11-21 09:00:00Z  ${made.uris[0]!}`,
      '',
    ]);
    expect((await cli.run(['export', 'list', '--json'])).json).toEqual({
      items: cli.api.engine.exports,
      nextCursor: null,
    });
    expect((await cli.run(['export', 'show', made.name, '--json'])).json).toEqual(made);
    expect((await cli.run(['export', 'show', 'x'])).stderr).toContain('holdfast export list');
    const removed = await cli.run(['export', 'remove', made.id]);
    expect(removed.stdout).toBe(`${made.name} is not published any more.\n`);
    expect(cli.api.engine.exports.map(({ id }) => id)).not.toContain(made.id);
  });

  test('that are not served say why, and no line to paste is printed', async () => {
    const { id } = await publish();
    const problem = {
      ...{ code: 'EXPORT_REFUSED' as const, message: 'no\u001b[2J image', remedy: 'Look.' },
      details: {},
    };
    Object.assign(cli.api.engine.exports[0]!, { uris: [], sizeBytes: null, problem });
    const show = await cli.run(['export', 'show', id]);
    expect(show.stdout).toContain('EXPORT_REFUSED: no\\u{1b}[2J image\nLook.\n');
    expect((await cli.run(['export', 'list'])).stdout).toContain('published: EXPORT_REFUSED');
  });

  test('are materialized: told at once, or followed to the end', async () => {
    const { id } = await publish('--writable');
    const started = await cli.run(['export', 'materialize', id]);
    const [run] = cli.api.engine.runs;
    expect(started.stdout).toBe(
      `Operation ${run!.id} is queued. Look at it: holdfast operation show ${run!.id}\n`,
    );
    const show = await cli.run(['export', 'show', id]);
    expect(show.stdout).toContain(`running (operation ${run!.id})`);
    const following = cli.run(['export', 'materialize', id, '--wait']);
    const next = await nextRun(cli);
    const result = { kind: 'materialize' as const, exportId: id, imagePath: '/srv/o.qcow2', fileBytes: 4096 };
    cli.api.engine.moveRun(next.id, { state: 'completed', endedAt: next.createdAt, result });
    const followed = await following;
    expect(followed.code).toBe(0);
    expect(followed.stdout).toContain('/srv/o.qcow2 (4.0 KiB) stands alone');
    const run2 = await cli.run(['run', 'show', next.id]);
    expect(run2.stdout).toContain('/srv/o.qcow2 (4.0 KiB) stands alone');
  });
});

describe('export status', () => {
  test('shows listeners, what is not served and why, and what happened', async () => {
    const status = await cli.run(['export', 'status']);
    expect(status.code).toBe(1);
    expect(status.stdout).toMatch(/^exports\s+1 served, 1 failed$/m);
    expect(status.stdout).toMatch(/^tcp\s+127\.0\.0\.1:10809\s+psk\s+up\s+1$/m);
    expect(status.stdout).toMatch(/^unix\s+\/run\/nbd\.sock\s+none\s+down\s+0\s+INTERNAL: it ended$/m);
    expect(status.stdout).toMatch(/^b\.conf\s+-\s+INVALID_INPUT: format must be stated$/m);
    expect(status.stdout).toMatch(
      /^2026-11-21 09:00:00Z\s+storage-daemon-restarted\s+tcp\s+with 2 exports$/m,
    );
    expect((await cli.run(['export', 'status', '--json'])).json).toEqual(cli.api.engine.daemon);
  });

  test('is a success when all is served, and none when nobody runs', async () => {
    const { daemon } = cli.api.engine;
    const [listener] = daemon.status!.listeners;
    Object.assign(daemon.status!, { listeners: [listener], files: [], events: [] });
    const well = await cli.run(['export', 'status']);
    expect(well.code).toBe(0);
    expect(well.stdout).not.toMatch(/FAILED|EVENT/);
    daemon.isRunning = false;
    expect((await cli.run(['export', 'status'])).code).toBe(1);
    const problem = {
      ...{ code: 'EXPORT_DAEMON_UNAVAILABLE' as const, message: 'it never ran', remedy: 'Start it.' },
      details: {},
    };
    cli.api.engine.daemon = { isRunning: false, status: null, problem };
    const gone = await cli.run(['export', 'status']);
    expect(gone.code).toBe(1);
    expect(gone.stdout).toBe('state  not running\n\nEXPORT_DAEMON_UNAVAILABLE: it never ran\nStart it.\n');
  });
});

describe('export identity', () => {
  test('create shows the key once, as clients take it', async () => {
    const made = await cli.run(['export', 'identity', 'create', 'agent7']);
    expect(made.stdout).toBe('agent7:00112233445566778899aabbccddeeff\n');
    expect(made.stderr).toContain('not shown again');
    expect((await cli.run(['export', 'identity', 'list'])).stdout).toBe('USER\nagent7\n');
    const removed = await cli.run(['export', 'identity', 'remove', 'agent7']);
    expect(removed.stdout).toBe('The key of agent7 is gone.\n');
    expect((await cli.run(['export', 'identity', 'list', '--json'])).json).toEqual({ items: [] });
  });

  test('create --out keeps it in a new file that only its owner reads', async () => {
    const out = path.join(cli.directory, 'keys.psk');
    const made = await cli.run(['export', 'identity', 'create', 'agent7', '--out', out]);
    expect(made.stdout).toBe(`The key of agent7 is in ${out}.\n`);
    expect(await readFile(out, 'utf8')).toBe('agent7:00112233445566778899aabbccddeeff\n');
    expect((await stat(out)).mode & 0o777).toBe(0o600);
    const again = await cli.run(['export', 'identity', 'create', 'agent8', '--out', out]);
    expect(again.code).toBe(2);
    expect(cli.api.engine.users).toEqual(['agent7']);
  });
});

describe('volume', () => {
  test('discover shows every device with what tells it from others', async () => {
    const found = await cli.run(['volume', 'discover']);
    expect(found.stdout.split('\n')).toEqual([
      'DEVICE      TYPE     SIZE  MODEL      VOLUME  IN USE           IDENTITIES',
      '/dev/sdb    disk  8.0 GiB  QEMU DISK  -       -                wwn:0x5000c500a1b2c3d4, serial:QEMU_1',
      '/dev/loop0  loop  1.0 GiB  -          -       mounted on /mnt  -',
      '',
    ]);
  });

  test('add, list, show, device and remove', async () => {
    await cli.run(['volume', 'add', 'serial:QEMU_1']);
    const volume = await addVolumeByPath();
    expect(cli.api.engine.requests).toEqual([
      { name: null, identity: 'serial:QEMU_1', devicePath: null },
      { name: 'archive', identity: null, devicePath: '/dev/sdb' },
    ]);
    const list = await cli.run(['volume', 'list']);
    expect(list.stdout).toMatch(/^\w{26} {2}archive {2}detached {2}\/dev\/sdb {2}8\.0 GiB {2}wwn:/m);
    expect((await cli.run(['volume', 'device', 'archive'])).stderr).toContain('CONFLICT');
    await attach('archive');
    expect((await cli.run(['volume', 'device', 'archive'])).stdout).toBe('/dev/sdb\n');
    expect((await cli.run(['volume', 'show', 'archive'])).stdout).toMatch(
      /^attached at\s+\/dev\/sdb \(8:16\)$/m,
    );
    expect((await cli.run(['volume', 'remove', 'archive'])).code).toBe(1);
    volume.mapping = null;
    expect((await cli.run(['volume', 'remove', 'archive'])).stdout).toBe('archive is forgotten.\n');
    expect((await cli.run(['volume', 'show', 'archive'])).stderr).toContain('holdfast volume list');
  });

  async function addVolumeByPath(): Promise<VolumeView> {
    await cli.run(['volume', 'add', '/dev/sdb', '--name', 'archive']);
    return cli.api.engine.volumes.at(-1)!;
  }

  async function attach(name: string): Promise<CliResult> {
    const running = cli.run(['volume', 'attach', name]);
    const run = await nextRun(cli);
    const volumeId = cli.api.engine.volumes.at(-1)!.id;
    const result = { kind: 'attach-volume' as const, volumeId, devicePath: '/dev/sdb' };
    cli.api.engine.moveRun(run.id, { state: 'completed', endedAt: run.createdAt, result });
    return running;
  }

  test('attach and detach are followed to their end; how they ended is the exit code', async () => {
    const { id } = await addVolume();
    const attached = await attach('archive');
    expect(attached.code).toBe(0);
    expect(attached.stdout).toContain(`Volume ${id} is attached at /dev/sdb.`);
    const detaching = cli.run(['volume', 'detach', 'archive']);
    const run = await nextRun(cli);
    const error = {
      ...{ code: 'VOLUME_IN_USE' as const, message: 'an export uses it', remedy: 'Remove it.' },
      details: {},
    };
    cli.api.engine.moveRun(run.id, { state: 'failed', endedAt: run.createdAt, error });
    const failed = await detaching;
    expect(failed.code).toBe(1);
    expect(failed.stdout).toContain('VOLUME_IN_USE: an export uses it\nRemove it.\n');
  });

  test('--no-wait answers the operation, which can be looked at', async () => {
    const { id } = await addVolume();
    const detached = await cli.run(['volume', 'detach', 'archive', '--no-wait']);
    const [run] = cli.api.engine.runs;
    expect(detached.stdout).toContain(`holdfast operation show ${run!.id}`);
    const attached = await cli.run(['volume', 'attach', 'archive', '--no-wait', '--json']);
    expect(attached.json).toMatchObject({ kind: 'attach-volume', subjectId: id, state: 'queued' });
    const show = await cli.run(['operation', 'show', run!.id]);
    expect(show.stdout).toMatch(/^kind\s+detach-volume$/m);
    expect(show.stdout).toMatch(new RegExp(`^volume\\s+${id}$`, 'm'));
    const json = await cli.run(['operation', 'show', run!.id, '--json']);
    expect(json.json).toMatchObject({ id: run!.id, kind: 'detach-volume' });
    expect((await cli.run(['operation', 'show', newUlid()])).code).toBe(1);
    expect((await cli.run(['run', 'list', '--kind', 'attach-volume'])).stdout).toContain('attach-volume');
  });
});

describe('volumes and pushes elsewhere', () => {
  test('a machine may have them as disks; a volume is named by name or id', async () => {
    const volume = await addVolume();
    cli.api.engine.requests.length = 0;
    const args = [
      ...['--disk', 'name=vda,source=volume:archive,tracking=compare'],
      ...['--disk', 'name=vdb,source=push,size=1000001'],
    ];
    const added = await cli.run(['vm', 'add', 'db', ...args]);
    expect(added.code).toBe(0);
    expect(cli.api.engine.requests).toEqual([
      {
        name: 'db',
        disks: [
          { name: 'vda', source: { kind: 'volume', volumeId: volume.id, changeTracking: 'compare' } },
          { name: 'vdb', source: { kind: 'push', sizeBytes: 1_000_001 } },
        ],
      },
    ]);
    const show = await cli.run(['vm', 'show', 'db']);
    expect(show.stdout).toContain(`compare   volume ${volume.id}`);
    expect(show.stdout).toContain('-         (pushed by an agent)');
  });

  test.each([
    'name=a,source=push',
    'name=a,source=push,size=big',
    'name=a,source=push,size=1GiB,format=raw',
    'name=a,source=push,size=1GiB,tracking=auto',
    'name=a,source=volume:x,format=raw',
    'name=a,source=volume:x,tls-username=u',
    'name=a,source=/x,format=raw,size=1GiB',
    'name=a,source=volume:',
  ])('vm add --disk %s is wrong usage', async (disk) => {
    expect((await cli.run(['vm', 'add', 'x', '--disk', disk])).code).toBe(2);
    expect(cli.api.engine.requests).toEqual([]);
  });

  test('a disk may be restored to a volume', async () => {
    const volume = await addVolume();
    const vm = await addVm(cli);
    const { id } = cli.api.engine.addPoint(vm);
    const restored = await cli.run(['restore', 'run', id, '--disk', 'vda=volume:archive', '--detach']);
    expect(restored.code).toBe(0);
    expect(cli.api.engine.requests.at(-1)).toMatchObject({
      disks: [{ diskId: vm.disks[0]!.id, target: { kind: 'volume', volumeId: volume.id } }],
    });
  });

  test('run show tells what the agent of a push writes to, while it runs', async () => {
    const vm = await addVm(cli);
    const { id: repositoryId } = await addRepository(cli);
    const body = { vmId: vm.id, repositoryId, source: 'push' };
    await cli.api.call('POST', '/api/v1/backups', { body });
    const run = cli.api.engine.runs[0]!;
    const show = await cli.run(['run', 'show', run.id]);
    expect(show.stdout).toMatch(/^vda\s+full\s+-\s+no\s+nbd:\S+\s+There is no point/m);
    expect(show.stdout).toMatch(/^vdb\s+bitmap\s+holdfast-1\s+no\s+nbd:\S+\s+It counts from/m);
    expect(show.stdout).toContain('says nothing for 5 min 00 s fails the run');
    const pointId = newUlid() as PointId;
    cli.api.engine.moveRun(run.id, { state: 'completed', result: { kind: 'backup', pointId } });
    const ended = await cli.run(['run', 'show', run.id]);
    expect(ended.stdout).not.toContain('nbd:');
    expect(ended.stdout).toContain(`Point ${pointId} is committed.`);
  });
});
