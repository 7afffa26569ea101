{
  "variables": { "sanitize_addon%": 0 },
  "targets": [
    {
      "target_name": "holdfast_native",
      "sources": [
        "src/addon.cc",
        "src/cluster-judge.cc",
        "src/copy-session.cc",
        "src/copy-worker.cc",
        "src/failure.cc",
        "src/file-endpoints.cc",
        "src/handle-glue.cc",
        "src/hash.cc",
        "src/io.cc",
        "src/js-values.cc",
        "src/mailbox.cc",
        "src/nbd-connection.cc",
        "src/nbd-endpoints.cc",
        "src/nbd-handle.cc",
        "src/plan-window.cc",
        "src/resolve.cc",
        "src/session-glue.cc",
        "src/threads.cc"
      ],
      "include_dirs": ["<!(node -p \"require('node-addon-api').include_dir\")"],
      "defines": ["NAPI_VERSION=9", "NAPI_CPP_EXCEPTIONS"],
      "cflags": ["<!@(pkg-config --cflags libnbd libxxhash libcrypto)", "-Wall", "-Wextra", "-fvisibility=hidden"],
      "cflags_cc!": ["-fno-exceptions", "-fno-rtti", "-std=gnu++17", "-std=gnu++20"],
      "cflags_cc": ["-fexceptions", "-std=c++20", "-O2"],
      "libraries": ["<!@(pkg-config --libs libnbd libxxhash libcrypto)"],
      "conditions": [
        ["sanitize_addon==1", {
          "cflags": ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"],
          "ldflags": ["-fsanitize=address,undefined"]
        }]
      ]
    }
  ]
}
