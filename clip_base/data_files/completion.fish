# Completion of clip-base and regionclip in fish: regionclip completion fish | source

function __clip_base_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    for line in ($words[1] completion --words $words[2..-1] "$current" 2>/dev/null)
        if test "$line" != :files
            echo $line
        else if string match -q '*=*' -- "$current"
            set -l key (string replace -r '=.*' '=' -- "$current")
            for path in (__fish_complete_path (string replace -r '^[^=]*=' '' -- "$current"))
                echo $key$path
            end
        else
            __fish_complete_path "$current"
        end
    end
end

complete -c clip-base -f -a '(__clip_base_complete)'
complete -c regionclip -f -a '(__clip_base_complete)'
