import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { ProgressDisplay } from '../../src/cli/progress.js';
import { formatTable } from '../../src/cli/table.js';
import { displayWidth, safeText } from '../../src/cli/text.js';
import { addVm, startCliFixture, type CliFixture } from './fixture.js';

/** Names no API of ours lets in, but a repository of somebody else may hold. */
const HOSTILE = [
  '\u001b[31mred\u001b[0m',
  '\u001b]0;title\u0007',
  '\u009b2J',
  'line\nbreak\rreturn\ttab\0nul\bback\u007f',
  '\u202egnp.exe\u202c',
  '\u200f\u200e\u061c\u2066x\u2069',
  'zero\u200bwidth\ufeff\u00ad',
  'para\u2028graph\u2029',
  '\ud800lone',
];
/** What must never reach a terminal; a table's own line breaks may. */
const HARM = /(?!\n)[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u;

describe('hostile text', () => {
  test.each(HOSTILE)('%j is neutralised, and still to be told apart', (text) => {
    const safe = safeText(text);
    expect(safe).not.toMatch(HARM);
    expect(safe).not.toContain('\n');
    expect(safe).toContain('\\u{');
  });

  test('ordinary names of any language stay as they are', () => {
    for (const text of ['web-01', 'Müller & Söhne', '数据库', 'Ελλάδα', 'שרת', '🙂', 'e\u0301']) {
      expect(safeText(text)).toBe(text);
    }
  });

  test('a table keeps one line for each row and its columns in place', () => {
    const rows = [...HOSTILE, '数据库', 'x'].map((name) => ({ name, id: 'ID' }));
    const table = formatTable(rows, [
      { title: 'NAME', value: (row) => row.name },
      { title: 'ID', value: (row) => row.id },
    ]);
    const lines = table.trimEnd().split('\n');
    expect(lines).toHaveLength(rows.length + 1);
    const positions = lines.map((line) => displayWidth(line.slice(0, line.lastIndexOf('ID'))));
    expect(new Set(positions).size).toBe(1);
  });
});

describe('hostile names from the daemon', () => {
  let cli: CliFixture;
  beforeEach(async () => {
    cli = await startCliFixture();
  });
  afterEach(async () => {
    await cli[Symbol.asyncDispose]();
  });

  test('are neutralised in every table, field, remark and error', async () => {
    const vm = await addVm(cli);
    const hostile = HOSTILE.join('');
    const point = cli.api.engine.addPoint(vm);
    Object.assign(cli.api.engine.vms[0]!, { name: hostile });
    Object.assign(vm.disks[0]!, { name: hostile });
    cli.api.engine.vms[0]!.disks[0]!.name = hostile;
    point.vmName = hostile;
    point.layers[0]!.diskName = hostile;
    point.layers[0]!.reason.sentence = hostile;
    for (const args of [
      ['vm', 'list'],
      ['vm', 'show', vm.id],
      ['backup', 'list'],
      ['backup', 'show', point.id],
      ['backup', 'chain', point.id],
      ['restore', 'run', point.id, '--disk', `nosuch${hostile}=/x`],
      ['vm', 'show', hostile],
      ['vm', hostile],
    ]) {
      const { stdout, stderr } = await cli.run(args);
      expect(stdout + stderr, args.join(' ')).not.toMatch(HARM);
    }
  });

  test('JSON keeps the text exactly, in JSON’s own escapes', async () => {
    await addVm(cli);
    const name = HOSTILE.slice(0, 8).join('');
    Object.assign(cli.api.engine.vms[0]!, { name });
    const { json } = await cli.run(['vm', 'list', '--json']);
    expect(json).toMatchObject({ items: [{ name }] });
  });
});

describe('progress', () => {
  const run = {
    kind: 'backup',
    state: 'running',
    stage: 'transfer',
    attempt: 1,
    isStalled: false,
    isCancelRequested: false,
    progress: {
      share: 2,
      bytesPerSecond: 0,
      etaSeconds: null,
      disks: [{ diskId: 'd', totalBytes: 0, bytesRead: 5, bytesZeroed: 0, method: null }],
    },
  } as unknown as Parameters<ProgressDisplay['update']>[0];

  test('never leaves the line: narrow terminals and long names are cut', () => {
    let text = '';
    const out = { isTTY: true, columns: 30, write: (chunk: string) => (text += chunk) };
    new ProgressDisplay(out, new Map([['d', '数'.repeat(500)]])).update(run);
    const lines = text.split('\n').slice(0, -1);
    expect(lines).toHaveLength(2);
    for (const line of lines) {
      // eslint-disable-next-line no-control-regex -- our own sequences take no columns
      expect(displayWidth(line.replaceAll(/\u001b\[[0-9]*[A-Z]|\r/g, ''))).toBeLessThan(30);
    }
  });

  test('odd figures stay within 0 and 100 %', () => {
    let text = '';
    new ProgressDisplay({ write: (chunk) => (text += chunk) }, new Map()).update(run);
    expect(text).toContain('100 %');
    expect(text).toContain('  0 %  0 B of 0 B');
  });

  test('a second update overwrites the first on a terminal', () => {
    let text = '';
    const out = { isTTY: true, columns: 80, write: (chunk: string) => (text += chunk) };
    const display = new ProgressDisplay(out, new Map());
    display.update(run);
    display.update(run);
    expect(text).toContain('\u001b[2A');
    display.finish();
    text = '';
    display.update(run);
    expect(text).not.toContain('\u001b[2A');
  });
});
