import { describe, expect, it } from 'vitest';
import { isErrorCode } from '../../src/lib/errors.js';
import { localUri, parseLibvirtUri } from '../../src/libvirt/libvirt-uri.js';

describe('connection URIs of libvirt', () => {
  it.each(['qemu:///system', 'qemu+unix:///system', 'qemu+unix:///system?socket=/run/x/libvirt-sock'])(
    'leave %s as it is: a daemon of this host',
    (text) => {
      expect(parseLibvirtUri(text).host).toBeNull();
      expect(localUri(text)).toBe(text);
    },
  );

  it('tell the socket of a daemon of this host', () => {
    expect(parseLibvirtUri('qemu:///system?socket=/a%20b').socket).toBe('/a b');
  });

  it('tell host, port, user and files of a remote one, which is not for virsh', () => {
    const text = 'qemu+ssh://root@kvm1.example:2222/system?keyfile=/etc/id&known_hosts=/etc/known';
    const files = { keyFile: '/etc/id', knownHostsFile: '/etc/known' };
    expect(parseLibvirtUri(text)).toEqual({
      host: { name: 'kvm1.example', user: 'root', port: 2222, ...files },
      socket: null,
    });
    expect(parseLibvirtUri('qemu+ssh://[fe80::1]/system').host?.name).toBe('fe80::1');
    expect(() => localUri(text)).toThrow(/this host only/);
  });

  it.each([
    ['', 'empty'],
    ['/system', 'no scheme'],
    ['qemu:///session', 'the session daemon of root'],
    ['qemu+ssh://host/session', 'a remote session'],
    ['qemu:///embed?root=/tmp', 'an embedded driver'],
    ['qemu://host/system', 'a host over TLS'],
    ['qemu+tcp://host/system', 'a host without encryption'],
    ['qemu+ext:///system?command=/bin/sh', 'a program to run'],
    ['qemu+ssh://host/system?command=/bin/sh', 'a program in place of ssh'],
    ['qemu+ssh://host/system?netcat=sh', 'a program at the other end'],
    ['qemu+ssh://host/system?no_verify=1', 'no check of the host'],
    ['qemu+ssh://-oProxyCommand=x/system', 'an option as host'],
    ['qemu+ssh://-oX@host/system', 'an option as user'],
    ['qemu+ssh://%E0%A4%A@host/system', 'a user that cannot be decoded'],
    ['qemu+ssh://u:secret@host/system', 'a password'],
    ['qemu+ssh:///system', 'no host'],
    ['qemu+ssh://host/system?keyfile=id', 'a relative path'],
    ['qemu+ssh://host/system?keyfile=/a&keyfile=/b', 'a parameter twice'],
    ['qemu:///system?socket=/a%0Ab', 'a newline'],
    ['qemu:///system#x', 'a fragment'],
    ['qemu:///system --help', 'a space'],
    ['test:///default', 'another driver'],
  ])('refuse %s (%s)', (text) => {
    let error: unknown;
    try {
      parseLibvirtUri(text);
    } catch (caught) {
      error = caught;
    }
    expect(isErrorCode(error, 'INVALID_INPUT')).toBe(true);
    expect(String(error)).not.toContain('secret');
  });

  it('refuse what is longer than any address', () => {
    expect(() => parseLibvirtUri(`qemu:///system?socket=/${'a'.repeat(4000)}`)).toThrow(/longer than/);
  });
});
