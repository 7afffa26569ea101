import { readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { newUlid } from '../../src/lib/id.js';
import { addRepository, addVm, startCliFixture, type CliFixture } from './fixture.js';

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

describe('repository', () => {
  test('create, list and show: a table for people, one document for programs', async () => {
    const created = await cli.run(['repository', 'create', 'main', '/repo', '--json']);
    expect(created.code).toBe(0);
    expect(created.json).toEqual(cli.api.engine.repositories[0]);
    const list = await cli.run(['repository', 'list']);
    expect(list.stdout.split('\n')).toEqual([
      'ID                          NAME  DIRECTORY  STATE   AVAILABLE',
      `${cli.api.engine.repositories[0]!.id}  main  /repo      online   35.0 GiB`,
      '',
    ]);
    const json = await cli.run(['repository', 'list', '--json']);
    expect(json.json).toEqual({ items: cli.api.engine.repositories, nextCursor: null });
    const show = await cli.run(['repository', 'show', 'main']);
    expect(show.stdout).toMatch(/^name\s+main$/m);
  });

  test('create --open --takeover is sent as such; --takeover alone is wrong usage', async () => {
    await cli.run(['repository', 'create', 'old', '/old', '--open', '--takeover', '--hash', 'sha-256']);
    expect(cli.api.engine.requests).toEqual([
      { name: 'old', root: '/old', hash: 'sha-256', mode: 'open', takeover: true },
    ]);
    expect((await cli.run(['repository', 'create', 'x', '/x', '--takeover'])).code).toBe(2);
    expect((await cli.run(['repository', 'create', 'x', '/x', '--hash', 'md5'])).code).toBe(2);
  });

  test('an offline repository says why', async () => {
    await addRepository(cli);
    Object.assign(cli.api.engine.repositories[0]!, {
      isOnline: false,
      capacity: null,
      problem: { code: 'REPOSITORY_OFFLINE', message: 'not mounted', remedy: 'Mount it.', details: {} },
    });
    const show = await cli.run(['repository', 'show', 'main']);
    expect(show.stdout).toContain('REPOSITORY_OFFLINE: not mounted');
    expect(show.stdout).toContain('Mount it.');
  });
});

describe('vm', () => {
  test('add takes every kind of disk', async () => {
    const args = [
      ...['--disk', 'name=vda,source=nbd://h:10809/vda,tracking=bitmap,tls-psk-file=/etc/psk,tls-username=u'],
      ...['--disk', 'name=vdb,source=/srv/a,b.qcow2,format=qcow2'],
      ...['--disk', 'name=vdc,source=nbd+unix:///x?socket=/run/a,b.sock'],
      ...[
        '--disk-json',
        '{"name":"a,b=c","source":{"kind":"image","path":"/d","format":"raw","changeTracking":"compare"}}',
      ],
    ];
    const added = await cli.run(['vm', 'add', 'db', ...args]);
    expect(added.stderr).toBe('');
    expect(added.code).toBe(0);
    expect(cli.api.engine.requests[0]).toEqual({
      name: 'db',
      disks: [
        {
          name: 'vda',
          source: {
            kind: 'nbd',
            uri: 'nbd://h:10809/vda',
            changeTracking: 'bitmap',
            tls: { pskFile: '/etc/psk', username: 'u' },
          },
        },
        {
          name: 'vdb',
          source: { kind: 'image', path: '/srv/a,b.qcow2', format: 'qcow2', changeTracking: 'auto' },
        },
        {
          name: 'vdc',
          source: { kind: 'nbd', uri: 'nbd+unix:///x?socket=/run/a,b.sock', changeTracking: 'auto' },
        },
        { name: 'a,b=c', source: { kind: 'image', path: '/d', format: 'raw', changeTracking: 'compare' } },
      ],
    });
  });

  const wrong: [string, string][] = [
    ['no source', 'name=vda'],
    ['no name', 'source=nbd://x'],
    ['a relative path', 'name=a,source=disk.raw,format=raw'],
    ['a file without a format: nothing is guessed', 'name=a,source=/disk.qcow2'],
    ['a format for an export', 'name=a,source=nbd://x,format=raw'],
    ['an unknown format', 'name=a,source=/x,format=vmdk'],
    ['an unknown tracking', 'name=a,source=nbd://x,tracking=x'],
    ['an unknown key', 'nam=a,source=nbd://x'],
    ['a key given twice', 'name=a,name=b,source=nbd://x'],
    ['TLS for a file', 'name=a,source=/x,format=raw,tls-psk-file=/p'],
  ];
  test.each(wrong)('add --disk with %s is wrong usage', async (_what, disk) => {
    const result = await cli.run(['vm', 'add', 'x', '--disk', disk]);
    expect(result.code).toBe(2);
    expect(result.stderr).toContain('--disk');
    expect(cli.api.engine.requests).toEqual([]);
  });

  test('a --disk-json that does not fit is told by the daemon', async () => {
    const result = await cli.run(['vm', 'add', 'x', '--disk-json', '{"name":1}']);
    expect(result.code).toBe(1);
    expect(result.stderr).toContain('INVALID_INPUT');
    expect((await cli.run(['vm', 'add', 'x', '--disk-json', '[1'])).code).toBe(2);
    expect((await cli.run(['vm', 'add', 'x'])).code).toBe(2);
  });

  test('list pages, show by name and id, remove', async () => {
    const vm = await addVm(cli);
    await addVm(cli, 'web-02');
    const list = await cli.run(['vm', 'list', '--limit', '1']);
    expect(list.stdout.split('\n')[1]).toMatch(new RegExp(`^${vm.id}  web-01  - +2  16.0 GiB$`));
    expect(list.stderr).toBe('There is more: --cursor 1\n');
    const rest = await cli.run(['vm', 'list', '--cursor', '1', '--json']);
    expect(rest.json).toMatchObject({ items: [{ name: 'web-02' }], nextCursor: null });
    for (const text of ['web-01', vm.id]) {
      expect((await cli.run(['vm', 'show', text, '--json'])).json).toEqual(vm);
    }
    const removed = await cli.run(['vm', 'remove', 'web-01']);
    expect(removed.stdout).toBe('web-01 is forgotten.\n');
    const missing = await cli.run(['vm', 'show', 'web-01']);
    expect(missing.code).toBe(1);
    expect(missing.stderr).toContain('NOT_FOUND');
  });

  test('a name that two machines have, or that is the id of another, is an error with the ids', async () => {
    const first = await addVm(cli);
    const second = await addVm(cli, first.id);
    const result = await cli.run(['vm', 'show', first.id]);
    expect(result.code).toBe(1);
    expect(result.stderr).toContain(`${first.id}, ${second.id}`);
  });
});

describe('backup', () => {
  test('list with filters, show, chain, stats', async () => {
    await addRepository(cli);
    const vm = await addVm(cli);
    const point = cli.api.engine.addPoint(vm);
    const list = await cli.run(['backup', 'list', '--vm', 'web-01', '--repository', 'main']);
    expect(list.stdout).toContain(`${point.id}  web-01  1  full  crash        2026-11-21 09:00:00Z  2.0 GiB`);
    const show = await cli.run(['backup', 'show', point.id.toLowerCase()]);
    expect(show.stdout).toContain('There is no point to stand on.');
    const chain = await cli.run(['backup', 'chain', point.id]);
    expect(chain.stdout).toContain(`qemu-img convert -f qcow2 -O raw /repo/${point.layers[0]!.id}.qcow2`);
    const stats = await cli.run(['backup', 'stats', '--json']);
    expect(stats.json).toMatchObject({ points: 1, fileBytes: 2 * 1024 ** 3 });
  });

  test('a delete that others stand in the way of lists them', async () => {
    const vm = await addVm(cli);
    const full = cli.api.engine.addPoint(vm);
    const top = cli.api.engine.addPoint(vm, 'incremental');
    const result = await cli.run(['backup', 'delete', full.id]);
    expect(result.code).toBe(1);
    expect(result.stderr).toContain('POINT_HAS_DEPENDENTS');
    expect(result.stderr).toContain(`dependents: ${top.id}`);
    expect(result.stderr).toContain('Delete the points listed in the details first, newest first.');
  });

  test('run sends what was asked for', async () => {
    const vm = await addVm(cli);
    const { id } = await addRepository(cli);
    const sincePointId = newUlid();
    const result = await cli.run([
      ...['backup', 'run', 'web-01', '--repository', 'main', '--type', 'incremental', '--rate', '100MiB'],
      ...['--bitmap', `vda=b@1@${sincePointId}`, '--queue', '--detach', '--json'],
    ]);
    expect(result.stderr).toBe('');
    expect(result.json).toMatchObject({ state: 'queued', kind: 'backup' });
    expect(cli.api.engine.requests.at(-1)).toEqual({
      vmId: vm.id,
      repositoryId: id,
      type: 'incremental',
      bitmaps: [{ diskId: vm.disks[0]!.id, name: 'b@1', sincePointId }],
      bytesPerSecond: 100 * 1024 ** 2,
      consistency: 'prefer',
      disks: { include: [], exclude: [] },
      whenBusy: 'queue',
    });
  });

  test.each([
    [['--type', 'differential']],
    [['--rate', '100MB']],
    [['--rate', '-1']],
    [['--bitmap', 'vda=b']],
    [['--bitmap', 'vda=b@x']],
    [['--consistency', 'always']],
    [['--nonsense']],
  ])('run with %j is wrong usage', async (args) => {
    await addVm(cli);
    await addRepository(cli);
    const result = await cli.run(['backup', 'run', 'web-01', '--repository', 'main', ...args]);
    expect(result.code).toBe(2);
    expect(cli.api.engine.runs).toEqual([]);
  });

  test('run without a repository is wrong usage', async () => {
    expect((await cli.run(['backup', 'run', 'web-01'])).code).toBe(2);
  });
});

describe('restore', () => {
  test('run takes files, exports and devices, and --to for all', async () => {
    const vm = await addVm(cli);
    const point = cli.api.engine.addPoint(vm);
    const [vda, vdb] = vm.disks;
    const targets: [string, object][] = [
      ['/srv/a.raw', { kind: 'file', path: '/srv/a.raw', format: 'raw' }],
      ['/srv/a.qcow2', { kind: 'file', path: '/srv/a.qcow2', format: 'qcow2' }],
      ['/srv/a,b,format=qcow2', { kind: 'file', path: '/srv/a,b', format: 'qcow2' }],
      ['/dev/shm/a', { kind: 'file', path: '/dev/shm/a', format: 'raw' }],
      ['/dev/vg/lv', { kind: 'device', path: '/dev/vg/lv' }],
      ['nbd://h/x?y=1', { kind: 'nbd', uri: 'nbd://h/x?y=1' }],
    ];
    for (const [text, target] of targets) {
      const result = await cli.run(['restore', 'run', point.id, '--disk', `vda=${text}`, '--detach']);
      expect(result.code, text).toBe(0);
      expect(cli.api.engine.requests.at(-1)).toMatchObject({
        pointId: point.id,
        disks: [{ diskId: vda!.id, target }],
        overwrite: false,
        acceptDamage: false,
      });
    }
    await cli.run(['restore', 'run', point.id, '--to', '/srv', '--overwrite', '--accept-damage', '--detach']);
    expect(cli.api.engine.requests.at(-1)).toMatchObject({
      disks: [
        { diskId: vda!.id, target: { kind: 'file', path: '/srv/vda.raw', format: 'raw' } },
        { diskId: vdb!.id, target: { kind: 'file', path: '/srv/vdb.raw', format: 'raw' } },
      ],
      overwrite: true,
      acceptDamage: true,
    });
    const list = await cli.run(['restore', 'list', '--json']);
    expect((list.json as { items: { id: string }[] }).items).toHaveLength(7);
    const show = await cli.run(['restore', 'show', cli.api.engine.runs[0]!.id]);
    expect(show.stdout).toMatch(/^state\s+queued$/m);
  });

  test('a disk name that leads elsewhere does not become a file name', async () => {
    const vm = await addVm(cli);
    const point = cli.api.engine.addPoint(vm);
    point.layers[0]!.diskName = '../../etc/passwd';
    await cli.run(['restore', 'run', point.id, '--to', '/srv', '--detach']);
    const { disks } = cli.api.engine.requests.at(-1) as { disks: { target: { path: string } }[] };
    expect(disks[0]!.target.path).toBe(`/srv/${vm.disks[0]!.id}.raw`);
  });

  test.each([[[]], [['--disk', 'vda']], [['--disk', 'vda=relative']], [['--disk', 'vda=/x', '--to', '/y']]])(
    'run with %j is wrong usage',
    async (args) => {
      expect((await cli.run(['restore', 'run', newUlid(), ...args])).code).toBe(2);
    },
  );

  test('an unknown disk names those there are', async () => {
    const point = cli.api.engine.addPoint(await addVm(cli));
    const result = await cli.run(['restore', 'run', point.id, '--disk', 'sda=/x']);
    expect(result.code).toBe(1);
    expect(result.stderr).toContain('vda, vdb');
  });
});

describe('tokens', () => {
  test('create --out keeps the text off the terminal', async () => {
    const out = path.join(cli.directory, 'new-token');
    const created = await cli.run(['token', 'create', 'monitoring', '--out', out]);
    expect(created.code).toBe(0);
    const secret = (await readFile(out, 'utf8')).trim();
    expect((await stat(out)).mode & 0o777).toBe(0o600);
    expect(created.stdout + created.stderr).not.toContain(secret);
    const list = await cli.run(['token', 'list', '--token-file', out]);
    expect(list.stdout).toContain('monitoring');
    expect(list.stdout).not.toContain(secret);
    const again = await cli.run(['token', 'create', 'x', '--out', out]);
    expect(again.code).toBe(2);
    expect(cli.api.engine.tokens).toHaveLength(2);
    const { id } = cli.api.engine.tokens[1]!;
    expect((await cli.run(['token', 'revoke', id])).code).toBe(0);
    expect((await cli.run(['token', 'list', '--token-file', out])).code).toBe(4);
  });

  test('create shows the text once, alone on standard output', async () => {
    const created = await cli.run(['token', 'create', 'x']);
    expect(cli.api.engine.secrets.has(created.stdout.trim())).toBe(true);
  });
});

describe('runs', () => {
  test('list by kind, show, log in one document', async () => {
    await addRepository(cli);
    await cli.run(['repository', 'rescan', 'main', '--detach']);
    const run = cli.api.engine.runs[0]!;
    for (let sequence = 1; sequence <= 1500; sequence += 1) {
      const event = { sequence, at: run.createdAt, code: 'STEP', message: `step ${sequence}`, details: {} };
      cli.api.engine.runLog.push({ ...event, level: 'info' });
    }
    const list = await cli.run(['run', 'list', '--kind', 'rescan', '--state', 'queued']);
    expect(list.stdout).toContain(`${run.id}  rescan  queued`);
    expect((await cli.run(['run', 'show', run.id, '--json'])).json).toEqual(run);
    const log = await cli.run(['run', 'log', run.id, '--json']);
    expect(log.json).toEqual({ items: cli.api.engine.runLog });
    expect((await cli.run(['run', 'list', '--kind', 'x'])).code).toBe(2);
    const cancelled = await cli.run(['run', 'cancel', run.id]);
    expect(cancelled.stdout).toBe(`Run ${run.id} is cancelled.\n`);
    const again = await cli.run(['run', 'cancel', run.id, '--json']);
    expect(again.code).toBe(1);
    expect(again.json).toMatchObject({ error: { code: 'RUN_NOT_ACTIVE' } });
  });
});
