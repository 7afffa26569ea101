import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { VmView } from '../../src/engine/types.js';
import { newUlid, type PointId } from '../../src/lib/id.js';
import { addRepository, addVm, nextRun, startCliFixture, type CliFixture } from './fixture.js';

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

/** The machine in the engine itself: what a test changes in it is answered. */
async function discover(name = 'web-01'): Promise<VmView> {
  await cli.run(['vm', 'discover', 'qemu:///system', '--name', name]);
  return cli.api.engine.vms.at(-1)!;
}

async function discoverQemu(): Promise<VmView> {
  await cli.run(['vm', 'discover', '--qmp', '/run/web-01.qmp']);
  return cli.api.engine.vms.at(-1)!;
}

/** The line of a table that begins, after its number, with this. */
function lineOf(text: string, start: string): string {
  return text.split('\n').find((line) => line.replace(/^ *\d+ +/, '').startsWith(start)) ?? '';
}

describe('vm discover', () => {
  test('asks libvirt for all domains or for some, and lists what was found', async () => {
    const found = await cli.run(['vm', 'discover', 'qemu:///system', '--name', 'web-01', '--name', 'db-01']);
    expect(found.code).toBe(0);
    const [web, db] = cli.api.engine.vms;
    expect(found.stdout.split('\n')).toEqual([
      'ID                          NAME    STATE     DISKS      SIZE',
      `${web!.id}  web-01  running  2 of 3  16.0 GiB`,
      `${db!.id}  db-01   running  2 of 3  16.0 GiB`,
      '',
    ]);
    await cli.run(['vm', 'discover', 'qemu+ssh://root@kvm-02/system']);
    expect(cli.api.engine.requests).toEqual([
      { kind: 'libvirt', uri: 'qemu:///system', names: ['web-01', 'db-01'] },
      { kind: 'libvirt', uri: 'qemu+ssh://root@kvm-02/system', names: [] },
    ]);
    const json = await cli.run(['vm', 'discover', 'qemu:///system', '--name', 'x', '--json']);
    expect(json.json).toEqual({ items: [cli.api.engine.vms.at(-1)], problems: [] });
  });

  test('warns of a domain that could not be looked at', async () => {
    const error = {
      code: 'SOURCE_BUSY' as const,
      message: 'a migration holds it',
      remedy: 'Wait.',
      details: {},
    };
    cli.api.engine.discoveryProblems = [{ key: 'libvirt:6b5a1f2e', error }];
    const found = await cli.run(['vm', 'discover', 'qemu:///system', '--name', 'web-01']);
    expect(found.code).toBe(0);
    expect(found.stderr).toBe(
      'warning: libvirt:6b5a1f2e could not be looked at: a migration holds it (SOURCE_BUSY)\n',
    );
  });

  test('a domain that is not there is told, and is no success', async () => {
    const found = await cli.run(['vm', 'discover', 'qemu:///system', '--name', 'absent']);
    expect(found.code).toBe(1);
    expect(found.stdout).toBe('');
    expect(found.stderr).toContain('has no domain absent (NOT_FOUND)');
  });

  test('asks a QEMU by its QMP socket', async () => {
    const found = await cli.run(['vm', 'discover', '--qmp', '/run/a.qmp', '--agent', '/run/a.agent']);
    expect(found.code).toBe(0);
    await cli.run(['vm', 'discover', '--qmp', '/run/a.qmp']);
    expect(cli.api.engine.requests).toEqual([
      { kind: 'qemu', socket: '/run/a.qmp', agentSocket: '/run/a.agent' },
      { kind: 'qemu', socket: '/run/a.qmp', agentSocket: null },
    ]);
  });

  test.each([
    [[]],
    [['qemu:///system', '--qmp', '/run/a.qmp']],
    [['qemu:///system', '--agent', '/run/a.agent']],
    [['--agent', '/run/a.agent']],
    [['--qmp', '/run/a.qmp', '--name', 'web-01']],
    [['--qmp', 'a.qmp']],
    [['--qmp', '/run/a.qmp', '--agent', 'a.agent']],
    [['qemu:///system', 'qemu:///session']],
  ])('with %j is wrong usage', async (args) => {
    expect((await cli.run(['vm', 'discover', ...args])).code).toBe(2);
    expect(cli.api.engine.requests).toEqual([]);
  });

  test('what the daemon refuses is told with code and remedy', async () => {
    const refused = await cli.run(['vm', 'discover', 'qemu:///sys tem', '--json']);
    expect(refused.code).toBe(1);
    expect(refused.json).toMatchObject({ error: { code: 'INVALID_INPUT' } });
  });
});

describe('vm list and show', () => {
  test('list tells a machine that is gone, and one that no hypervisor is asked about', async () => {
    (await discover()).machine!.isPresent = false;
    await addVm(cli, 'by-hand');
    const { stdout } = await cli.run(['vm', 'list']);
    expect(stdout).toMatch(/ {2}web-01 +gone +2 of 3 {2}16\.0 GiB$/m);
    expect(stdout).toMatch(/ {2}by-hand +- +2 {2}16\.0 GiB$/m);
  });

  test('show has state, place, and for each disk what is done with it and why', async () => {
    const vm = await discover();
    vm.disks[0]!.facts!.isPresent = false;
    const { stdout } = await cli.run(['vm', 'show', 'web-01']);
    expect(stdout).toMatch(/^libvirt +qemu:\/\/\/system$/m);
    expect(stdout).toMatch(/^uuid +7f0d0a52-/m);
    expect(stdout).toMatch(/^state +running$/m);
    expect(stdout).toMatch(/^seen +2026-11-21 09:00:00Z$/m);
    const [vda, vdb, sda] = ['vda', 'vdb', 'sda'].map((name) => lineOf(stdout, `${name} `));
    expect(vda).toMatch(/8\.0 GiB +vda +WD-1 +qcow2 +no: gone from the machine +yes +\/images\/disk$/);
    expect(vdb).toMatch(/vdb +- +raw +yes +no: a raw image holds no bitmaps +\/images\/disk$/);
    expect(sda).toMatch(/sda +- +raw +no: it is a CD-ROM +no: a raw image/);
    expect(stdout).not.toContain('release');
    const disks = await cli.run(['vm', 'disks', 'web-01']);
    expect(stdout).toContain(disks.stdout);
    expect((await cli.run(['vm', 'disks', 'web-01', '--json'])).json).toEqual({ items: vm.disks });
  });

  test('show names the change records at the machine and how they are removed', async () => {
    const vm = await discover();
    const pointId = newUlid() as PointId;
    vm.machine!.changeRecords.push(
      { name: `holdfast-${pointId}`, pointId, isBroken: false },
      { name: 'holdfast-x', pointId: null, isBroken: true },
    );
    const { stdout } = await cli.run(['vm', 'show', 'web-01']);
    expect(stdout).toMatch(/^CHECKPOINTS +POINT +STATE$/m);
    expect(stdout).toContain(`holdfast-${pointId}  ${pointId}  ok\n`);
    expect(stdout).toMatch(/^holdfast-x +- +broken$/m);
    expect(stdout).toMatch(/libvirt does not undefine .*holdfast vm release /);
    expect(stdout).toContain(`holdfast vm release ${vm.id}\n`);
  });

  test('show of a QEMU has its sockets, and calls its records bitmaps', async () => {
    const vm = await discoverQemu();
    vm.machine!.changeRecords.push({ name: 'holdfast-x', pointId: null, isBroken: false });
    const { stdout } = await cli.run(['vm', 'show', vm.id]);
    expect(stdout).toMatch(/^qmp +\/run\/web-01\.qmp$/m);
    expect(stdout).toMatch(/^agent +-$/m);
    expect(stdout).toMatch(/^BITMAPS +POINT/m);
    expect(stdout).not.toContain('undefine');
  });

  test('what a hypervisor says cannot harm the terminal', async () => {
    const hostile = '\u001b]0;x\u0007\u202e\n';
    const vm = await discover();
    const [disk] = vm.disks;
    vm.name = hostile;
    Object.assign(disk!, { name: hostile });
    Object.assign(disk!.facts!, { target: hostile, serial: hostile, format: hostile, location: hostile });
    disk!.facts!.skip = { code: 'OPTED_OUT', sentence: hostile };
    disk!.facts!.incremental = { isPossible: false, reason: hostile };
    vm.machine!.source = { kind: 'libvirt', uri: `qemu:///${hostile}`, uuid: hostile };
    vm.machine!.changeRecords.push({ name: hostile, pointId: null, isBroken: false });
    const { id: point } = cli.api.engine.addPoint(vm);
    for (const args of [
      ['vm', 'list'],
      ['vm', 'show', vm.id],
      ['vm', 'disks', vm.id],
      ['vm', 'release', vm.id],
      ['restore', 'vm', point, '--pool', hostile],
    ]) {
      const { stdout, stderr } = await cli.run(args);
      expect(stdout + stderr, args.join(' ')).not.toMatch(/\p{Cf}|(?!\n)\p{Cc}/u);
    }
    expect((await cli.run(['vm', 'show', vm.id])).stdout).toContain('\\u{1b}]0;x\\u{7}\\u{202e}\\u{a}');
  });
});

describe('vm release', () => {
  test('tells what was removed, and what is of others', async () => {
    const vm = await discover();
    vm.machine!.changeRecords.push(
      { name: 'holdfast-a', pointId: null, isBroken: false },
      { name: 'holdfast-b', pointId: null, isBroken: true },
    );
    const released = await cli.run(['vm', 'release', 'web-01']);
    expect(released.code).toBe(0);
    expect(released.stdout).toBe(
      'Removed from web-01; the next backup reads all of its disks:\n  holdfast-a\n' +
        'Left alone, not of this appliance:\n  holdfast-b\n',
    );
    vm.machine!.changeRecords = [];
    const again = await cli.run(['vm', 'release', 'web-01']);
    expect(again.stdout).toBe('web-01 had no change records of this appliance.\n');
    const json = await cli.run(['vm', 'release', 'web-01', '--json']);
    expect(json.json).toEqual({ removed: [], kept: [] });
    expect((await cli.run(['vm', 'release', 'nobody'])).stderr).toContain('NOT_FOUND');
  });
});

describe('backup', () => {
  test('run sends consistency and the choice of disks as they were given', async () => {
    await discover();
    await addRepository(cli);
    const run = await cli.run([
      ...['backup', 'run', 'web-01', '--repository', 'main', '--consistency', 'require', '--detach'],
      ...['--disk', 'vda', '--disk', 'WD-2', '--exclude-disk', 'vdb'],
    ]);
    expect(run.stderr).toBe('');
    expect(run.code).toBe(0);
    expect(cli.api.engine.requests.at(-1)).toMatchObject({
      consistency: 'require',
      disks: { include: ['vda', 'WD-2'], exclude: ['vdb'] },
    });
  });

  test('estimate shows each disk with method, bytes and reason', async () => {
    const vm = await discover();
    const { id: repositoryId } = await addRepository(cli);
    const sincePointId = newUlid();
    const args = [
      ...['backup', 'estimate', 'web-01', '--repository', 'main', '--type', 'full'],
      ...['--exclude-disk', 'sda', '--bitmap', `vda=b@${sincePointId}`],
    ];
    const estimate = await cli.run(args);
    expect(estimate.code).toBe(0);
    expect(estimate.stdout.split('\n')).toEqual([
      'DISK     SIZE  METHOD      READS  REASON',
      'vda   8.0 GiB  full      1.0 GiB  There is no point to stand on.',
      'vdb   8.0 GiB  compare   unknown  A raw image keeps no record.',
      'sda   8.0 GiB  left out        -  It is a CD-ROM.',
      '',
      'reads in all  unknown',
      '',
    ]);
    expect(cli.api.engine.requests.at(-1)).toEqual({
      ...{ vmId: vm.id, repositoryId, type: 'full' },
      bitmaps: [{ diskId: vm.disks[0]!.id, name: 'b', sincePointId }],
      disks: { include: [], exclude: ['sda'] },
    });
    const json = await cli.run([...args, '--json']);
    expect(json.json).toMatchObject({ vmId: vm.id, repositoryId, totalBytes: null });
    expect(cli.api.engine.runs).toEqual([]);
  });

  test('estimate without a repository, or with an unknown type, is wrong usage', async () => {
    await discover();
    await addRepository(cli);
    expect((await cli.run(['backup', 'estimate', 'web-01'])).code).toBe(2);
    const args = ['backup', 'estimate', 'web-01', '--repository', 'main'];
    expect((await cli.run([...args, '--type', 'differential'])).code).toBe(2);
    expect((await cli.run([...args, '--consistency', 'never'])).code).toBe(2);
  });

  test('list and show tell the consistency of a point', async () => {
    const point = cli.api.engine.addPoint(await discover());
    point.consistency = 'application';
    expect((await cli.run(['backup', 'list'])).stdout).toMatch(/ full {2}application {2}2026-/);
    expect((await cli.run(['backup', 'show', point.id])).stdout).toMatch(/^consistency +application$/m);
  });
});

describe('restore vm', () => {
  const base = {
    ...{ kind: 'libvirt', uri: 'qemu:///system', name: null, identity: 'new' },
    ...{ format: 'qcow2', start: false },
  };
  const wishes: [string[], object][] = [
    [['--directory', '/images'], { ...base, place: { kind: 'directory', path: '/images' } }],
    [
      ['--to', 'qemu:///system?socket=/run/x', '--pool', 'default', '--name', 'web-01b', '--format', 'raw'],
      {
        ...{ ...base, uri: 'qemu:///system?socket=/run/x', name: 'web-01b', format: 'raw' },
        place: { kind: 'pool', name: 'default' },
      },
    ],
    [
      ['--same-identity', '--pool', 'default', '--start'],
      { ...base, identity: 'same', start: true, place: { kind: 'pool', name: 'default' } },
    ],
    [['--in-place'], { ...base, identity: 'replace', place: null }],
  ];
  test.each(wishes)('%j is sent as such', async (args, machine) => {
    const point = cli.api.engine.addPoint(await discover());
    const restored = await cli.run(['restore', 'vm', point.id, ...args, '--detach', '--json']);
    expect(restored.stderr).toBe('');
    expect(restored.code).toBe(0);
    expect(restored.json).toMatchObject({ kind: 'restore', request: { machine } });
    expect(cli.api.engine.requests.at(-1)).toEqual({ pointId: point.id, machine, acceptDamage: false });
  });

  test.each([
    [[]],
    [['--directory', '/images', '--pool', 'default']],
    [['--directory', 'images']],
    [['--pool', 'default', '--format', 'vmdk']],
    [['--in-place', '--same-identity']],
    [['--in-place', '--name', 'web-02']],
    [['--in-place', '--directory', '/images']],
    [['--in-place', '--pool', 'default']],
    [['--in-place', '--format', 'raw']],
    [['--pool', 'default', '--overwrite']],
  ])('with %j is wrong usage', async (args) => {
    const point = cli.api.engine.addPoint(await discover());
    expect((await cli.run(['restore', 'vm', point.id, ...args])).code).toBe(2);
    expect(cli.api.engine.runs).toEqual([]);
  });

  test('is followed to its end, which names the machine', async () => {
    const vm = await discover();
    const point = cli.api.engine.addPoint(vm);
    const args = ['restore', 'vm', point.id, '--pool', 'default', '--start', '--accept-damage'];
    const following = cli.run(args);
    const run = await nextRun(cli);
    expect(cli.api.engine.requests.at(-1)).toMatchObject({ acceptDamage: true });
    const target = { kind: 'file' as const, path: '/images/vda.qcow2', format: 'qcow2' as const };
    cli.api.engine.moveRun(run.id, {
      state: 'completed',
      result: {
        kind: 'restore',
        disks: [{ diskId: vm.disks[0]!.id, target, bytesWritten: 1024 ** 3, damagedBytes: 0 }],
        machine: { name: 'web-01\u001b[2J', uuid: '7f0d0a52-6a3f-4c0e-9a58-000000000002', isStarted: true },
      },
    });
    const { code, stdout } = await following;
    expect(code).toBe(0);
    expect(stdout).toMatch(/^vda +\/images\/vda\.qcow2 \(qcow2\) +1\.0 GiB +0 B$/m);
    expect(stdout).toContain(
      'Restored as web-01\\u{1b}[2J (7f0d0a52-6a3f-4c0e-9a58-000000000002), started.\n',
    );
  });
});
