import { expect, test } from 'vitest';
import { QmpSchema, requireFeatures } from '../../src/source/qemu/features.js';
import { listeningInodes } from '../../src/source/qemu/qemu-process.js';

const command = (name: string, argument: string) => ({ name, 'meta-type': 'command', 'arg-type': argument });
const object = (name: string, members: [string, string][]) => ({
  name,
  'meta-type': 'object',
  members: members.map(([member, type]) => ({ name: member, type })),
});

/** The parts of a schema that matter, as QEMU 7.2 gives them. */
function schema(options: { filterMembers: string[]; bitmapType: string }) {
  return new QmpSchema([
    command('transaction', '9'),
    command('blockdev-add', '1'),
    {
      name: '1',
      'meta-type': 'object',
      members: [{ name: 'driver', type: '8' }],
      variants: [
        { case: 'copy-before-write', type: '2' },
        { case: 'snapshot-access', type: '3' },
      ],
    },
    object(
      '2',
      options.filterMembers.map((name): [string, string] => [name, 'str']),
    ),
    object('3', [['file', 'str']]),
    command('block-export-add', '4'),
    { name: '4', 'meta-type': 'object', variants: [{ case: 'nbd', type: '5' }] },
    object('5', [['bitmaps', '6']]),
    { name: '6', 'meta-type': 'array', 'element-type': options.bitmapType },
    { name: '7', 'meta-type': 'alternate', members: [{ type: 'str' }, { type: '3' }] },
    { name: 'str', 'meta-type': 'builtin' },
  ]);
}

test('a QEMU with everything is taken', () => {
  const all = ['file', 'target', 'on-cbw-error', 'cbw-timeout'];
  expect(() => requireFeatures(schema({ filterMembers: all, bitmapType: '7' }))).not.toThrow();
});

test('what an older one lacks is named', () => {
  expect(() => requireFeatures(schema({ filterMembers: ['file', 'target'], bitmapType: 'str' }))).toThrow(
    expect.objectContaining({
      code: 'SOURCE_REFUSED',
      details: {
        missing: [
          'copy-before-write with on-cbw-error',
          'copy-before-write with cbw-timeout',
          'exports with bitmaps of other nodes',
        ],
      },
    }),
  );
});

test('the listening sockets of one path', () => {
  const table = [
    'Num       RefCount Protocol Flags    Type St Inode Path',
    '0000000016acf06b: 00000002 00000000 00010000 0001 01 117076 /run/q.sock',
    '00000000244a963d: 00000003 00000000 00000000 0001 03 117104 /run/q.sock',
    '00000000244a963e: 00000003 00000000 00000000 0001 03 117105',
    '00000000244a963f: 00000002 00000000 00010000 0001 01 117106 /run/q.sock2',
  ].join('\n');
  expect([...listeningInodes(table, '/run/q.sock')]).toEqual(['117076', '117104']);
});
